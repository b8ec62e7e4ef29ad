"""What the documents say is so: commands parse, twins agree, links lead somewhere, the reference is fresh."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import megatron_ru
from megatron_ru.commands.main import build_parser, discover_commands
from megatron_ru.models.variant import all_variants
from tests.hosts.deepspeed_parser import host_parser

PROJECT = Path(megatron_ru.__file__).parents[1]
TWINS = sorted(path.name for path in (PROJECT / "docs" / "en").glob("*.md"))
PAGES = sorted(
    [
        *PROJECT.glob("*.md"),
        *(PROJECT / "docs").rglob("*.md"),
        *(PROJECT / "launch").glob("*.md"),
        *(PROJECT / "csrc").glob("*.md"),
    ]
)
# Words that stand for whatever a reader puts there.
PLACEHOLDERS = {"ARGS", "PATH/pretrain_gpt.py"}


class Command(NamedTuple):
    """A call of megatron-ru in a document."""

    page: str
    whole: bool
    """Whether it stands in a block, to be copied, and not within a sentence."""
    words: list[str]
    """From the subcommand on."""


def relative(path):
    return str(path.relative_to(PROJECT))


def blocks(text):
    """The fenced blocks, without the fences."""
    return re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.M | re.S)


def prose(text):
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S)


def headings(text):
    """(level, words) of each heading outside the blocks."""
    return [(len(marks), words) for marks, words in re.findall(r"^(#+) +(.*)$", prose(text), flags=re.M)]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_comments(block):
    return [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in block.splitlines()]


def our_words(line):
    """The words behind our name in a command line, None where it does not call us."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        if word == "megatron-ru" or (word == "megatron_ru" and before == "-m"):
            return words[index + 1 :]
        if word == "megatron_ru.pretrain_gpt" and before == "-m":
            return ["pretrain_gpt", *words[index + 1 :]]
        if word.endswith("/pretrain_gpt.py") and "MEGATRON_RU=1" in words[:index]:
            return ["run_host", *words[index:]]
    return None


def commands_of(path):
    text = path.read_text(encoding="utf-8")
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = our_words(line.removeprefix("$ "))
            if words:
                yield Command(relative(path), True, words)
    for span in re.findall(r"`([^`\n]*)`", prose(text)):
        words = our_words(span.replace("\\|", "|"))
        if words:
            yield Command(relative(path), False, words[: words.index("|")] if "|" in words else words)


COMMANDS = [command for path in PAGES for command in commands_of(path)]


class Refused(Exception):
    """What a parser says instead of leaving the process."""


def parse(parser, words):
    """`words` by the class's own parsing: without the checks of sizes and files that follow it in a run."""

    def refuse(message):
        raise Refused(message)

    parser.error = refuse
    namespace, rest = argparse.ArgumentParser.parse_known_args(parser, words)
    assert rest == [], f"unknown: {rest}"
    return namespace


@pytest.fixture(scope="module")
def training_parser():
    """Megatron's own parser with our flags."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_ru.engines.deepspeed.flags import add_engine_flags
    from megatron_ru.plugin.arguments import extend_parser

    return add_engine_flags(extend_parser(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))))


def test_documents_hold_commands():
    used = {command.words[0] for command in COMMANDS}
    assert used >= {"pretrain_gpt", "run_host", "variants", "data", "tokenizer", "generate"}
    assert sum(command.whole for command in COMMANDS) > 40


def test_every_command_named_exists():
    known = set(discover_commands()) | {"--help", "--version"}
    wrong = [command for command in COMMANDS if command.words[0] not in known]
    # The page on errors shows one that does not exist.
    assert {command.words[0] for command in wrong} <= {"pretrain"}
    assert all(command.page.endswith("errors.md") for command in wrong)


def test_commands_with_a_parser_of_ours_parse():
    modules = discover_commands()
    wrong = []
    for command in COMMANDS:
        module = modules.get(command.words[0])
        if not command.whole or module is None or hasattr(module, "run_raw") or "--help" in command.words:
            continue
        parser = build_parser(modules)
        try:
            arguments = parser.parse_args(command.words)
        except SystemExit as error:
            wrong.append((command.page, shlex.join(command.words), str(error)))
            continue
        assert arguments.command == command.words[0]
    assert wrong == []


def test_launch_commands_render():
    from megatron_ru.commands.launch import job_of
    from megatron_ru.launch.target import TARGETS

    rendered = set()
    for command in COMMANDS:
        if not command.whole or command.words[0] != "launch":
            continue
        arguments = build_parser(discover_commands()).parse_args(command.words)
        checked = subprocess.run(["bash", "-n"], input=TARGETS[arguments.target].render(job_of(arguments)).content)
        assert checked.returncode == 0, command
        rendered.add(arguments.target)
    assert rendered == set(TARGETS)


@pytest.fixture(scope="module")
def deepspeed_parser():
    """Megatron-DeepSpeed's flags and ours."""
    from megatron_ru.hosts.megatron_deepspeed_arguments import extend_parser

    return extend_parser(host_parser(), lambda args: None)


def test_commands_with_megatrons_parser_parse(training_parser, deepspeed_parser):
    wrong, parsed = [], 0
    for command in COMMANDS:
        name, *words = command.words
        if not command.whole or name not in ("pretrain_gpt", "run_host"):
            continue
        if name == "run_host":
            assert words[0].endswith("pretrain_gpt.py"), command
            words = words[1:]
        words = [word for word in words if word not in PLACEHOLDERS]
        parser = deepspeed_parser if "Megatron-DeepSpeed" in command.words[1] else training_parser
        try:
            arguments = parse(parser, words)
        except (Refused, AssertionError) as error:
            wrong.append((command.page, shlex.join(words), str(error)))
            continue
        parsed += bool(words)
        if arguments.ru_variant is not None:
            assert arguments.ru_variant in all_variants(), command
        if words:
            # Without these the wheel's training loop stops with a traceback or a refusal.
            assert arguments.eval_interval is not None, command
            assert arguments.save is None or arguments.save_interval is not None, command
    assert wrong == []
    assert parsed >= 8


def test_flags_named_in_sentences_exist(training_parser, deepspeed_parser):
    """`--ru-variant NAME` and the like: a flag of Megatron, of ours, or of one of the commands."""
    known = set(training_parser._option_string_actions) | set(deepspeed_parser._option_string_actions)
    parsers = [build_parser(discover_commands())]
    while parsers:
        parser = parsers.pop()
        known |= set(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    # Those of other programs, and the one that the page on errors shows as unknown.
    known |= {
        "--no-such-flag", "--oversubscribe", "--allow-run-as-root",
        "--kill-on-bad-exit", "--exit-signal-handler",
    }  # fmt: skip
    wrong = []
    for path in PAGES:
        for span in re.findall(r"`([^`\n]*)`", prose(path.read_text(encoding="utf-8"))):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
                if flag not in known:
                    wrong.append((relative(path), flag))
    assert wrong == []


@pytest.mark.parametrize("name", [*TWINS, "README.md"])
def test_english_and_russian_agree(name):
    english = PROJECT / ("README.md" if name == "README.md" else f"docs/en/{name}")
    russian = PROJECT / ("README.ru.md" if name == "README.md" else f"docs/ru/{name}")
    assert russian.exists(), f"{relative(russian)} is missing"
    first, second = english.read_text(encoding="utf-8"), russian.read_text(encoding="utf-8")
    assert [level for level, _ in headings(first)] == [level for level, _ in headings(second)]
    assert [without_comments(block) for block in blocks(first)] == [without_comments(block) for block in blocks(second)]
    rows = [sum(line.startswith("|") for line in text.splitlines()) for text in (first, second)]
    assert rows[0] == rows[1], "tables of different length"


def test_no_russian_page_without_an_english_one():
    assert sorted(path.name for path in (PROJECT / "docs" / "ru").glob("*.md")) == TWINS


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_lead_somewhere(path):
    text = prose(path.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        if not place.exists():
            broken.append(target)
            continue
        anchors = {slug(words) for _, words in headings(place.read_text(encoding="utf-8"))} if anchor else set()
        if anchor and anchor not in anchors:
            broken.append(target)
    assert broken == []


def test_english_pages_link_english_ones_and_russian_ones_russian():
    wrong = [
        (relative(path), target)
        for language, other in (("en", "ru"), ("ru", "en"))
        for path in (PROJECT / "docs" / language).glob("*.md")
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
        if f"/{other}/" in target
    ]
    assert wrong == []


def test_reference_is_fresh():
    program = [sys.executable, str(PROJECT / "docs" / "generate_reference.py"), "--check"]
    shown = subprocess.run(program, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_reference_holds_our_flags_and_every_command():
    text = (PROJECT / "docs" / "reference" / "arguments.md").read_text(encoding="utf-8")
    assert "| `--device auto\\|cpu\\|cuda` |" in text
    assert "| `--ru-variant NAME` |" in text
    assert all(f"\n## megatron-ru {name}\n" in text for name in discover_commands())


def test_changelog_has_the_version():
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = [words for level, words in headings(text) if level == 2]
    assert versions[0].split()[0] == megatron_ru.__version__
    assert (3, "Numerics") in headings(text)


@pytest.mark.parametrize("name", ["README.md", "README.ru.md"])
def test_readme_begins_with_what_this_is_and_names_every_flag_of_ours(name):
    text = (PROJECT / name).read_text(encoding="utf-8")
    assert text.startswith("# megatron_ru\n\nmegatron_ru ")
    order = [text.index(f"```bash\n{line}\n") for line in ("make demo", "make test")]
    assert order == sorted(order)
    reference = (PROJECT / "docs" / "reference" / "arguments.md").read_text(encoding="utf-8")
    training = reference.partition("## Flags for training")[2].partition("\n## ")[0]
    flags = re.findall(r"`(--[\w-]+)", training)
    assert "--ru-metrics" in flags
    assert [flag for flag in flags if f"`{flag}" not in text] == []


@pytest.mark.parametrize("path", ["data/ru.bin", "runs/first/metrics.jsonl", "demo/loss.png"])
def test_what_the_commands_write_is_ignored_by_git(path):
    shown = subprocess.run(["git", "-C", str(PROJECT), "check-ignore", path], capture_output=True, text=True)
    if shown.returncode == 128:
        pytest.skip("not a git checkout")
    assert shown.returncode == 0, f"{path} would be committed"


def test_seams_page_lists_every_seam():
    """Names that the code replaces stand in docs/en/versions.md."""
    page = (PROJECT / "docs" / "en" / "versions.md").read_text(encoding="utf-8")
    source = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "megatron_ru").rglob("*.py"))
    targets = set(re.findall(r'target="(megatron\.[\w.]+:[\w.]+)"', source))
    assert len(targets) >= 14
    assert sorted(target for target in targets if f"`{target}`" not in page) == []
