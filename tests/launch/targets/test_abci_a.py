from tests.launch.targets.scripts import header, render


def test_differs_from_v_by_resource_and_gpus():
    script = render("abci-a", nodes=3, time="90m", group="g1")
    assert header(script)[2:4] == ["-l rt_AF=3", "-l h_rt=01:30:00"]
    assert "    mpirun -np 24 -npernode 8 " in script.text
