"""The pages about the command line and the environment say what the code says."""

from __future__ import annotations

import pytest
import reference_pages

from lmprobe_zarr import cli, config

AGAIN = "write it again: python tests/docs/reference_pages.py"


def test_the_command_line_page_matches_the_parser() -> None:
    assert reference_pages.COMMAND_LINE.read_text(encoding="utf-8") == reference_pages.command_line(), AGAIN


def test_the_page_about_the_environment_is_what_the_settings_say() -> None:
    assert reference_pages.ENVIRONMENT.read_text(encoding="utf-8") == reference_pages.environment(), AGAIN


@pytest.mark.few(8)
@pytest.mark.parametrize("name", [name for name, _ in reference_pages.commands()])
def test_help_matches_the_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = reference_pages.COMMAND_LINE.read_text(encoding="utf-8")
    section = page.split(f"## {name}\n", 1)[1].split("\n## ")[0]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*name.split(), "--help"])
    # Lines are broken wherever the terminal's width falls, also behind a hyphen.
    printed = "".join(capsys.readouterr().out.split())
    rows = [row.removeprefix("| `").removesuffix(" |").split("` | ") for row in section.splitlines() if row.startswith("| `")]
    assert rows
    for shown, meaning in rows:
        meaning = meaning.replace("~/.cache/lmprobe", str(config.cache_dir()))
        assert "".join(meaning.split()) in printed, shown
        for piece in shown.strip("[]").split(", "):
            assert piece.split()[0] in printed, shown
    # And the other way round: nothing that it prints is missing from the page.
    options = {piece for shown, _ in rows for piece in shown.replace(",", "").split() if piece.startswith("-")}
    parser = dict(reference_pages.commands())[name]
    # The page says once, at its top, what all commands take.
    everywhere = {"-h", "--help", "--anon", "--storage-options"}
    assert options == {text for action in parser._actions for text in action.option_strings} - everywhere
    assert all(f"`{option}" in page.split("\n## ")[0] for option in everywhere - {"-h", "--help"})
    assert f"lmprobe-zarr{name.replace(' ', '')}" in printed
