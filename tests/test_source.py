"""What is read off files without importing them: components, and which code a result hangs on."""

from __future__ import annotations

import pytest

from prunekit import source

FILES = {
    "a.py": "from prunekit import b\n",
    "b.py": "def late():\n    import prunekit.deep.c\n",
    "deep/__init__.py": "",
    "deep/c.py": "from prunekit.deep import d as other\n",
    "deep/d.py": "import torch\n",
    "unrelated.py": "x = 1\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of these files in the place of prunekit."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(source, "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """A process reads each file once."""
    for cached in (source._parsed, source._code_hash, source.imported_files, source._registered):
        cached.cache_clear()


def test_the_code_of_a_module_is_all_that_it_imports(package):
    found = source.import_closure(["prunekit.a"])
    assert {p.relative_to(package).as_posix() for p in found} == set(FILES) - {"unrelated.py"}
    assert source.import_closure(["prunekit.deep.d"]) == {package / "deep" / "d.py"}


@pytest.mark.parametrize("changed", sorted(FILES))
def test_only_code_that_is_used_changes_the_hash(package, changed):
    before = source.code_hash(["prunekit.a"])
    (package / changed).write_text(FILES[changed] + "# changed\n")
    forget()
    assert (source.code_hash(["prunekit.a"]) == before) == (changed == "unrelated.py")


def test_a_file_of_another_name_is_other_code(package):
    before = source.code_hash(["prunekit.unrelated"])
    (package / "unrelated.py").rename(package / "renamed.py")
    assert source.code_hash(["prunekit.renamed"]) != before


def test_a_name_that_is_no_module_is_refused(package):
    with pytest.raises(ValueError, match="prunekit.none is no module"):
        source.code_hash(["prunekit.none"])
    assert source.module_file("torch.nn") is None


def test_components_are_what_is_registered(package):
    (package / "criteria").mkdir()
    (package / "criteria" / "two.py").write_text(
        '@criteria.register(needs="data")\n'
        "def first(model, groups, run, *, mode: str = 'a', n: int):\n"
        '    """Says what. And more.\n\n    Then.\n    """\n\n\n'
        '@criteria.register("other", year=2026)\n'
        "def second(model, groups, run):\n    pass\n\n\n"
        "def helper():\n    pass\n"
    )
    found = source.components("criteria")
    assert list(found) == ["first", "other"]
    assert found["first"].options == {"mode": "'a'", "n": ""}
    assert found["first"].summary == "Says what."
    assert found["first"].meta == {"needs": "data"}
    assert found["other"].module == "prunekit.criteria.two"
