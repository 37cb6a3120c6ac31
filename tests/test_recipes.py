"""Recipe files: variants, scales, what is refused; and every recipe that comes with the library."""

import pytest

from lth_sparse import claims, experiment, recipes, report, tables
from lth_sparse.arms import ARMS

KNOWN = recipes.known()


def refusal(call, *args, **kwargs) -> str:
    """The message of the ValueError, which is one sentence."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message and not message.endswith(".")
    return message


def read(path, /, *args, **changes):
    """The only variant of a file."""
    (found,) = recipes.read(path, *args, **changes).variants.values()
    return found


def test_read(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('cost = "x"\n[settings]\ndataset = "digits"\nlr = 0.5\narms = ["ticket"]\n[scale.big]\nrounds = 9')
    assert (read(path).rounds, read(path).lr, read(path).arms) == (8, 0.5, ("ticket",))
    assert (read(path, "big").rounds, read(path, "big", rounds="2", lr="0.25").rounds) == (9, 2)
    assert read(path, "big", milestones="100, 2ep,").milestones == ("100", "2ep")
    assert "'small'" in refusal(read, path, "small")
    assert "'path'" in refusal(read, path, None, **{"path": "3"})
    found = recipes.read(path, "big")
    assert (found.name, found.cost, found.source, found.claims) == ("a-big", "x", "", ())


VARIANTS = """
claims = ["LN1"]
[settings]
dataset = "digits"
lr = 0.5
[variant.slow]
lr = 0.1
[variant.fast]
[scale.smoke]
rounds = 2
lr = 0.3
[scale.smoke.variant.fast]
rounds = 1
"""


def test_variants_scales_and_changes_lie_over_the_settings_in_this_order(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(VARIANTS)
    found = recipes.read(path)
    assert {name: recipe.lr for name, recipe in found.variants.items()} == {"slow": 0.1, "fast": 0.5}
    assert list(found.variants) == ["slow", "fast"] and found.claims == ("LN1",)
    smoke = recipes.read(path, "smoke").variants
    assert {name: (recipe.lr, recipe.rounds) for name, recipe in smoke.items()} == {"slow": (0.3, 2), "fast": (0.3, 1)}
    assert {recipe.rounds for recipe in recipes.read(path, "smoke", rounds=5).variants.values()} == {5}
    assert (
        recipes.read(path).identity()
        != recipes.read(path, "smoke").identity()
        == recipes.read(path, "smoke").identity()
    )
    only = recipes.read(path, "smoke", variant="fast")
    assert list(only.variants) == ["fast"] and only.variants["fast"] == smoke["fast"]
    assert "did you mean 'fast'" in refusal(recipes.read, path, None, variant="fasst")


@pytest.mark.parametrize(
    "text, words",
    [
        ("lr = ", "TOML"),
        ("[settings]\nlearning = 1", "'learning'"),
        ("[setings]\nlr = 1", "setings"),
        ("settings = 3", "settings"),
        ("scale = 3", "scale"),
        ("[scale]\nsmoke = 3", "scale"),
        ("[settings]\nlr = [1]", "lr"),
        ("[variant]\na = 3", "variant"),
        ("[settings]\nitertions = 3", "did you mean 'iterations'"),
        ("claims = 3", "claims"),
        ("source = 3", "source"),
        ('claims = ["LN99"]', "LN99"),
    ],
)
def test_read_refuses(tmp_path, text, words):
    (tmp_path / "a.toml").write_text(text)
    assert words in refusal(recipes.read, tmp_path / "a.toml")
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    assert "TOML" in refusal(recipes.read, tmp_path / "a.toml")


def test_a_scale_of_a_variant_that_is_none(tmp_path):
    (tmp_path / "a.toml").write_text("[variant.fast]\n[scale.smoke.variant.fats]\nrounds = 1")
    assert "did you mean 'fast'" in refusal(recipes.read, tmp_path / "a.toml", "smoke")


@pytest.mark.parametrize("name", KNOWN)
def test_every_recipe_says_where_it_is_from_and_can_be_read_at_any_scale(name):
    full = recipes.read(KNOWN[name])
    assert full.source and full.cost and set(full.claims) <= set(claims.load())
    scales = recipes.tomllib.loads(KNOWN[name].read_text(encoding="utf-8"))["scale"]
    assert "smoke" in scales
    for scale in (None, *scales):
        for recipe in recipes.read(KNOWN[name], scale).variants.values():
            assert recipe.resolve(1257 if scale == "smoke" else 45_000).identity()


def test_every_arm_is_in_a_recipe():
    used = {arm for path in KNOWN.values() for recipe in recipes.read(path).variants.values() for arm in recipe.arms}
    assert set(ARMS) - used == {"reinit-chain"}  # the TU Delft reproduction's third arm, an option of find-ticket


def test_find():
    assert recipes.find("lenet-mnist") == KNOWN["lenet-mnist"] and recipes.find(str(KNOWN["figure1"])).is_file()
    assert "did you mean 'figure1'" in refusal(recipes.find, "figur1")


@pytest.mark.parametrize("name", KNOWN)
def test_the_smoke_form_of_every_recipe_ends(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LTH_CACHE", str(tmp_path / "cache"))
    only = {"variant": "lr-0.01"} if name == "vgg-19" else {}  # 20 s for each of the four, in 20 million weights
    asked = recipes.read(KNOWN[name], "smoke", device="cpu", threads="1", **only)
    folder = experiment.run_all(asked, out=tmp_path / "run")
    summaries = {variant: report.summarize(run) for variant, run in report.variants(folder).items()}
    assert list(summaries) == list(asked.variants)
    for variant, summary in summaries.items():
        assert summary["status"]["done"] == summary["status"]["planned"] > 0, (variant, summary["status"])
        assert all(row["test_accuracy"]["mean"] > 0 for row in summary["rows"])
    assert [verdict.claim.id for verdict in claims.score(summaries, asked.claims)] == list(asked.claims)
    assert not any(verdict.verdict in ("holds", "fails") for verdict in claims.score(summaries, asked.claims))
    assert all(len(cells) == len(claims.HEAD) for cells in claims.rows(claims.score(summaries, asked.claims)))
    assert list(tables.of(summaries, asked.claims))
