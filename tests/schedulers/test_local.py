"""`megatron-ru launch local` on a host."""

from tests.schedulers.cluster import assert_world, launch, show_rank


def test_ranks_know_their_place_though_python3_is_a_script_of_sh(hosts, tmp_path):
    """Wrappers of Python are often `#!/bin/sh`, and Debian's sh drops the functions that bash has exported."""
    wrapper = tmp_path / "python3"
    wrapper.write_text(f'#!/bin/sh\nexec "{hosts.folder}/environment/bin/python3" "$@"\n')
    wrapper.chmod(0o755)
    record = tmp_path / "ranks"
    path = f"{tmp_path}:{hosts.login_environment()['PATH']}"
    ran = launch(hosts, "local", "--gpus-per-node", "2", host="h1", env={"PATH": path}, command=show_rank(record))
    assert ran.returncode == 0, ran.stdout
    assert_world(record, hosts, ["h1"], 2, master="127.0.0.1")
