import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.quoting import check_one_line, check_path, quoted, quoted_lines
from megatron_ru.launch.target import TARGETS

# Text that check_one_line lets through, with what bash reads as more than itself drawn often.
CHARACTERS = st.one_of(
    st.sampled_from("'\"$`\\!*?[]{}()<>|&;#~ -=%@\u00a0"), st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))
)
WORDS = st.lists(st.text(CHARACTERS, max_size=12).filter(lambda word: passes(word)), min_size=1, max_size=6)


def passes(word):
    try:
        check_one_line("a word", word)
    except UserError:
        return False
    return True


def through_bash(text):
    """What bash makes of the array `words` in a script, word by word."""
    script = f'set -euo pipefail\n{text}\nprintf "%s\\0" "${{words[@]}}"\n'
    shown = subprocess.run(["bash"], input=script.encode(), capture_output=True, check=True)
    return shown.stdout.decode().split("\0")[:-1]


@settings(max_examples=150, deadline=None)
@given(WORDS)
def test_bash_reads_the_words_back(words):
    assert through_bash(f"words=({quoted(words)})") == words
    assert through_bash(f"words=(\n{quoted_lines(words)}\n)") == words


@settings(max_examples=100, deadline=None)
@given(
    WORDS,
    st.dictionaries(
        st.from_regex(r"[A-Z]{3}_[A-Z0-9]{1,5}", fullmatch=True), st.text(CHARACTERS).filter(passes), max_size=3
    ),
)
def test_the_lines_of_a_rendered_script_give_words_and_variables_back(words, env):
    """The very lines of the script, from the variables to the end of the command."""
    env = {name: value for name, value in env.items() if not name.startswith("RU_")}
    job = JobSpec(target="local", command=("echo", *words), gpus_per_node=1, env=env)
    text = TARGETS["local"].render(job).text
    assert subprocess.run(["bash", "-n"], input=text.encode()).returncode == 0
    lines = re.search(r"(?s)(?:# Variables of every rank\..*?)?# What every rank runs\.\n.*?\n\)\n", text)[0]
    values = " ".join(f'"${{{name}}}"' for name in env)
    assert through_bash(f'{lines}\nwords=("${{ru_command[@]}}" {values})') == ["echo", *words, *env.values()]


def test_flags_begin_lines():
    assert quoted_lines(["run", "me", "--a", "1", "--b"]) == "    run me\n    --a 1\n    --b"


@pytest.mark.parametrize(
    ("text", "code"),
    [("a\nb", "U\\+000A at character 2"), ("\r", "U\\+000D"), ("\0", "U\\+0000"), ("\x1b[2J", "U\\+001B"),
     ("\u2028", "U\\+2028"), ("\u202e", "U\\+202E"), ("\x7f", "U\\+007F"), ("\x85", "U\\+0085"),
     ("\udc80", "U\\+DC80")],
)  # fmt: skip
def test_control_characters_are_refused_by_their_number(text, code):
    with pytest.raises(UserError, match=f"^here holds {code}"):
        check_one_line("here", text)


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "is empty"), ("  ", "is empty"), ("-rf", "as an option: write ./-rf"), ("a\nb", "U\\+000A")],
)
def test_paths_that_are_none(path, message):
    with pytest.raises(UserError, match=message):
        check_path("the folder", path)
