from megatron_ru.figures.text_table import text_table


def test_columns_are_aligned():
    assert text_table(["step", "loss"], [["first", "8.1"], ["b", "10.25"]], right={1}) == "\n".join(
        ["step    loss", "─────  ─────", "first    8.1", "b      10.25"]
    )
