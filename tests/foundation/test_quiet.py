import os
import subprocess
import sys

PROGRAM = """
import os, sys
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.quiet import held_output
print("before")
try:
    with held_output():
        print("python")
        print("python's errors", file=sys.stderr)
        os.write(1, b"C\\n")
        {ending}
except Exception as error:
    print("raised", type(error).__name__)
print("after")
"""


def outputs(ending):
    environ = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(ending=ending)], capture_output=True, env=environ)
    return done.stdout.decode(), done.stderr.decode()


def test_nothing_is_shown_of_what_goes_well():
    assert outputs("pass") == ("before\nafter\n", "")


def test_all_is_shown_of_what_fails():
    out, err = outputs("raise RuntimeError")
    assert out == "before\nraised RuntimeError\nafter\n"
    assert sorted(err.splitlines()) == ["C", "python", "python's errors"]


def test_a_sentence_for_the_user_stands_alone():
    assert outputs("raise UserError('x')") == ("before\nraised UserError\nafter\n", "")
