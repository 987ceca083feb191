"""The README's table of methods is what the registries say."""

from __future__ import annotations

from paths import ROOT

from prunekit.listing import methods_table


def test_readme_has_the_methods_that_there_are():
    text = (ROOT / "README.md").read_text()
    assert text.split("<!-- methods -->\n")[1].split("<!-- /methods -->")[0].strip() == methods_table().strip(), (
        "the README's table is stale: paste the output of `prunekit list --markdown` between its markers"
    )
