"""Claims judged on made-up summaries: every kind holds, fails and is not measured; a changed run decides nothing."""

import json
from pathlib import Path

import pytest

from lth_sparse import claims
from lth_sparse.claims.measured import MEASURED

SUMMARY = Path(__file__).parents[1] / "experiments/results/lenet-mnist/summary.json"
LENET = {"model": "lenet-300-100", "dataset": "mnist", "iterations": 50000}
CONV = {"dataset": "cifar10", "dropout": 0.0}
DEEP = {"dataset": "cifar10", "scope": "global", "warmup": 0}


def row(arm, round, density=None, n=5, weights=None, stop=1000, test=0.9, final=0.9, train=1.0, validation=0.9):
    """Rounds keep 80 % each unless told; `weights` is a count."""
    measures = {"early_stop_iteration": stop, "test_accuracy": test, "final_test_accuracy": final}
    measures |= {"train_accuracy": train, "validation_accuracy": validation}
    spread = {name: {"mean": value, "min": 0, "max": 9e9} for name, value in measures.items()}
    counted = {} if weights is None else {"weights": weights}
    return {"arm": arm, "round": round, "density": density or 0.8**round, "n": n, **spread, **counted}


def arm(name="ticket", rounds=16, **series):
    """Rows 0 to `rounds`; a series gives a measure by round, and stays as it was dense where it says nothing."""
    dense = {key: values[0] for key, values in series.items() if 0 in values}
    return [
        row(name, r, **dense | {key: values[r] for key, values in series.items() if r in values})
        for r in range(rounds + 1)
    ]


def run(*arms, **settings):
    return {"settings": LENET | settings, "rows": [row for arm in arms for row in arm]}


def verdict(id, *runs):
    (found,) = claims.score({str(i): run for i, run in enumerate(runs)}, [id])
    assert found.claim.id == id
    return found


def judged(id, *runs):
    found = verdict(id, *runs)
    return found.measured, found.verdict


def test_every_claim_has_a_measure_and_a_kind_that_is_known():
    loaded = claims.load()
    assert set(loaded) == set(MEASURED)
    assert loaded["LN8"][:5] == ("LN8", "s2", "lenet", "Pm where reinit acc first < r0; ticket: 2.9", 21.1)
    assert loaded["S4-1"].value == 74.75 and loaded["S4-1"].tag == "S"
    for claim in loaded.values():
        assert claim.kind in ("abs", "lower", "upper", "interval", "rounds") and claim.tag in ("V", "S", "D", "G")
        assert (claim.tol is None) == (claim.kind == "interval")
        assert claim.kind in ("abs", "interval") or not isinstance(claim.value, list)
    with pytest.raises(ValueError, match="unknown claim 'LN14': choose from LN1, LN2"):
        claims.score({}, ["LN1", "LN14"])


REINIT = arm("reinit", stop={0: 1, 7: 7530}, test={0: 0.1, 7: 0.985})  # its own dense network counts for nothing


def one_shot(*rounds, **better):
    """The arm one-shot, better than dense in these rounds and alike in others; round 0 is that of the ticket."""
    ((measure, (dense, level)),) = better.items()
    series = {0: dense} | {r: level for r in rounds}
    return run(arm(**{measure: {0: dense}}), arm("one-shot", 14, **{measure: series})[1:])


@pytest.mark.parametrize(
    "id, evidence, measured, expected",
    [
        ("LN1", run(arm(stop={0: 5000, 7: 3100})), 38, "holds"),
        ("LN1", run(arm(stop={0: 5000, 7: 4500})), 10, "fails"),
        ("LN2", run(arm(stop={0: 4000, 15: 5000})), 1.25, "holds"),
        ("LN2", run(arm(stop={0: 4000, 15: 6000})), 1.5, "fails"),
        ("LN3", run(arm(test={0: 0.98, 9: 0.982})), 0.2, "holds"),
        ("LN3", run(arm(test={0: 0.98, 9: 0.9805})), 0.05, "fails"),
        ("LN4", run(arm(test={0: 0.98, 15: 0.979})), -0.1, "holds"),
        ("LN4", run(arm(test={0: 0.98, 15: 0.983})), 0.3, "fails"),
        ("LN5", run(arm(final={0: 0.98, 4: 0.985, 5: 0.96})), 0.5, "holds"),
        ("LN5", run(arm(final={0: 0.98, 4: 0.987})), 0.7, "fails"),
        ("LN5", run(arm()), 0, "fails"),  # a gain is claimed
        ("LN6", run(arm(stop={7: 3000}), REINIT), 2.51, "holds"),
        ("LN6", run(arm(stop={7: 1000}), REINIT), 7.53, "fails"),
        ("LN7", run(arm(test={7: 0.99}), REINIT), 0.5, "holds"),
        ("LN7", run(arm(test={7: 0.984}), REINIT), -0.1, "fails"),
        ("LN8", run(arm(test={0: 0.98}), arm("reinit", test={0: 0.99, 9: 0.97})), 13.421773, "holds"),
        ("LN8", run(arm(test={0: 0.98}), arm("reinit", test={0: 0.99, 10: 0.97})), 10.737418, "fails"),
        ("LN8", run(arm(test={0: 0.98}), arm("reinit", test={0: 0.99})), None, "fails"),
        ("LN9", one_shot(2, 3, 4, 5, 6, 7, stop=(900, 500)), [64, 51.2, 40.96, 32.768, 26.2144, 20.97152], "holds"),
        ("LN9", one_shot(1, 3, 8, stop=(900, 500)), [51.2], "fails"),
        ("LN10", one_shot(*range(1, 14), test=(0.9, 0.91)), [100 * 0.8**r for r in range(1, 14)], "holds"),
        ("LN10", one_shot(2, test=(0.9, 0.91)), [64], "fails"),
        ("LN11", run(arm(train={0: 0.996, 14: 0.9})), 99.6, "holds"),
        ("LN11", run(arm(train={0: 1.0, 13: 0.99})), 99, "fails"),
        ("S1-1", run(arm(test={7: 0.99}), arm("reinit", test={r: 0.892 for r in range(8, 15)})), 1.825, "holds"),
        ("S1-1", run(arm(), arm("reinit")), 0, "fails"),  # the null result
        ("S1-2", run(arm(stop={8: 2000}), arm("reinit", stop={0: 2000})), 16 / 9, "holds"),
        ("S1-2", run(arm(), arm("reinit")), 1, "fails"),
        ("S1-3", run(arm(test={0: 0.98, 3: 0.982})), 0.2, "holds"),
        ("S1-3", run(arm()), 0, "fails"),
    ],
)
def test_claims_of_one_lenet(id, evidence, measured, expected):
    assert judged(id, evidence) == (measured and pytest.approx(measured), expected)


def sgd(lr, **series):
    return run(arm(rounds=21, **series), optimizer="sgd", lr=lr)


def width(weights, last, model="lenet-25-9"):
    """A lenet as accurate as dense up to round 2, where `weights` are left, and perhaps in round 3."""
    accuracy = {0: 0.9, 1: 0.95, 2: 0.9, 3: last}
    return run([row("ticket", r, weights=weights * 2 ** (2 - r), test=accuracy[r]) for r in range(4)], model=model)


@pytest.mark.parametrize(
    "id, runs, measured, expected",
    [
        ("LN12", [run(arm()), sgd(0.8, test={0: 0.9, 21: 0.8}), sgd(0.4)], [100 * 0.8**21, 100 * 0.8**20], "holds"),
        ("LN12", [sgd(0.4, test={r: 0.8 for r in range(19, 22)}), sgd(0.8)], [100 * 0.8**18, 100 * 0.8**21], "fails"),
        ("LN13", [width(9000, 0.8), width(15000, 0.8, "lenet-300-100")], [9000, 15000], "holds"),
        ("LN13", [width(9000, 0.8), width(15001, 0.8)], [9000, 15001], "fails"),
    ],
)
def test_claims_of_several_lenets(id, runs, measured, expected):
    assert judged(id, *runs) == (pytest.approx(measured), expected)


def conv(layers, rounds=21, dropout=0.0, **series):
    iterations = {2: 20000, 4: 25000, 6: 30000}[layers]
    settings = {"model": f"conv-{layers}", "dataset": "cifar10", "iterations": iterations, "dropout": dropout}
    return run(arm(rounds=rounds, **series), **settings)


def convs(dropout=0.0, **series):
    return [conv(layers, dropout=dropout, **series) for layers in (6, 2, 4)]


def accuracies(start, *later):
    return {"test": {0: start} | dict(enumerate(later, 1))}


@pytest.mark.parametrize(
    "id, runs, measured, expected",
    [
        ("CV1", convs(stop={0: 7000, 11: 2000, 12: 2500}), 3.5, "holds"),
        ("CV1", convs(stop={0: 7000, 11: 1000}), 7, "fails"),
        ("CV2", convs(stop={0: 7000, 12: 2000}), 3.5, "holds"),
        ("CV2", convs(), 1, "fails"),
        ("CV3", convs(stop={0: 5000, 10: 2000}), 2.5, "holds"),
        ("CV3", convs(), 1, "fails"),
        ("CV4", convs(**accuracies(0.65, 0.69)), 4, "reported"),
        ("CV5", convs(**accuracies(0.65, 0.69)), 4, "reported"),
        ("CV6", convs(**accuracies(0.65, 0.69)), 4, "reported"),
        ("CV7", convs(test={0: 0.6} | {r: 0.7 for r in range(1, 22)}), [100 * 0.8**21] * 3, "holds"),
        ("CV7", convs(test={0: 0.6} | {r: 0.7 for r in range(1, 22) if r != 5}), [32.768] * 3, "fails"),
        ("CV8", convs(train={0: 0.99, 5: 0.98, 20: 0.5}), [98] * 3, "holds"),
        ("CV8", convs(train={0: 0.99, 5: 0.97}), [97] * 3, "fails"),
        ("CV9", convs(test={0: 0.6}) + convs(0.5, test={0: 0.625}), [2.5] * 3, "holds"),
        ("CV9", convs(test={0: 0.6}) + convs(0.5, test={0: 0.617}), [1.7] * 3, "fails"),  # conv-4 gains 3
        ("CV10", convs() + convs(0.5, **accuracies(0.6, 0.635)), [3.5] * 3, "holds"),
        ("CV10", convs() + convs(0.5, **accuracies(0.6, 0.605)), [0.5] * 3, "fails"),
        ("CV11", convs(validation={0: 0.69, 3: 0.7}), [69, 70], "holds"),
        ("CV11", convs(validation={0: 0.65, 3: 0.7}), [65, 70], "fails"),
        ("CV12", convs(validation={0: 0.9, **{r: 0.78 for r in range(1, 22)}}), 78, "holds"),  # not of dense
        ("CV12", convs(), 90, "fails"),
        ("CV13", convs(validation={0: 0.8}), 80, "holds"),
        ("CV13", convs(), 90, "fails"),
        ("ZH5", convs(test={0: 0.7}), [70] * 3, "reported"),
    ],
)
def test_claims_of_convolutional_networks(id, runs, measured, expected):
    assert judged(id, *runs) == (pytest.approx(measured), expected)


def resnet(lr, warmup=0, rounds=20, **series):
    settings = {"model": "resnet-18", "dataset": "cifar10", "iterations": 30000, "milestones": [20000, 25000]}
    return run(arm(rounds=rounds, **series), **settings, scope="global", lr=lr, warmup=warmup)


def vgg(lr, warmup=0, scope="global", rounds=20, **series):
    settings = {"model": "vgg-19", "dataset": "cifar10", "iterations": 112000, "lr": lr, "warmup": warmup}
    return run(arm(rounds=rounds, **series), **settings, scope=scope)


def falls(round):
    """Final accuracies that are those of the dense network up to a round."""
    return {"final": {0: 0.9} | {r: 0.895 for r in range(round + 1, 21)}}


RESNETS = [resnet(0.1, final={0: 0.905}), resnet(0.01, final={0: 0.8, 3: 0.99, 4: 0.895, 7: 0.99})]
VGGS = [vgg(0.1, final={0: 0.92}), vgg(0.01, **falls(15)), vgg(0.1, 10000, **falls(16))]


@pytest.mark.parametrize(
    "id, runs, measured, expected",
    [
        ("RN1", RESNETS, 89.5, "holds"),
        ("RN1", [resnet(0.01)], 90, "holds"),
        ("RN1", [resnet(0.01, final={0: 0.91})], 91, "fails"),
        ("RN2", RESNETS, 90.5, "holds"),
        ("RN2", [resnet(0.1, final={0: 0.89})], 89, "fails"),
        ("RN3", [resnet(0.03), resnet(0.03, 20000, final={6: 0.907})], 90.7, "holds"),
        ("RN3", [resnet(0.03, 20000, final={6: 0.89})], 89, "fails"),
        ("RN4", [resnet(0.03, 20000, **falls(8))], 16.777216, "holds"),  # 11.8 % is about round 10
        ("RN4", [resnet(0.03, 20000, **falls(7))], 20.97152, "fails"),
        ("VG1", VGGS, 2.8147498, "holds"),
        ("VG1", [vgg(0.1, 10000, **falls(15))], 3.5184372, "fails"),
        ("VG2", [*VGGS, vgg(0.1, 10000, "layer", **falls(9))], 13.421773, "holds"),
        ("VG2", [*VGGS, vgg(0.1, 10000, "layer", **falls(8))], 16.777216, "fails"),
        ("VG3", [vgg(0.01, final={0: 0.9, 14: 0.891} | {r: 0.8 for r in range(15, 21)})], 4.3980465, "holds"),
        ("VG3", VGGS, 100 * 0.8**20, "fails"),
        ("VG4", [vgg(0.1), vgg(0.1, 10000, final={0: 0.912})], 1.2, "holds"),
        ("VG4", VGGS, -2, "fails"),
    ],
)
def test_claims_of_deep_networks(id, runs, measured, expected):
    assert judged(id, *runs) == (pytest.approx(measured), expected)


def supermasks(model, dataset, n=3, **accuracies):
    found = {name.replace("_", "-"): {"mean": accuracy} for name, accuracy in accuracies.items()}
    return {"settings": {"model": model, "dataset": dataset}, "n": n, "supermasks": found}


@pytest.mark.parametrize(
    "id, measured, expected", [("ZH1", [86, 40], "holds"), ("ZH3", [95, 66], "reported"), ("ZH4", None, "not measured")]
)
def test_claims_of_supermasks(id, measured, expected):
    runs = [
        supermasks("lenet-300-100", "mnist", large_final_same_sign_constant=0.86, learned=0.95),
        supermasks("conv-2", "cifar10", large_final_same_sign_constant=0.35, learned=0.6, learned_rescaled=0.61),
        supermasks("conv-4", "cifar10", large_final_same_sign_constant=0.40, learned=0.66),
    ]
    assert judged(id, *runs) == (measured and pytest.approx(measured), expected)


def test_rescaled_supermasks_stand_for_each_network():
    runs = [supermasks(f"conv-{n}", "cifar10", learned_rescaled=0.6 + n / 100, other=0.2) for n in (2, 4, 6)]
    found = verdict("ZH4", *runs)
    assert found.measured == pytest.approx([62, 64, 66]) and (found.n, found.verdict) == (3, "reported")
    assert found.reason == "from secondary sources"
    assert verdict("ZH2", *runs).reason == "no run with dataset mnist"


@pytest.mark.parametrize(
    "id, runs, why",
    [
        ("LN1", [], "no run with model lenet-300-100"),
        ("LN1", [run(arm()), run(arm(), normalization="none")], "2 runs with model lenet-300-100"),
        ("LN1", [run(arm(rounds=6))], "the arm ticket has no early stop iteration in round 7"),
        ("LN3", [run(arm(test={9: None}))], "the arm ticket has no test accuracy in round 9"),
        ("LN5", [run(arm(rounds=14))], "the arm ticket ends at 4.4 % of the weights, and 3.6 % are needed"),
        ("LN6", [run(arm())], "the run has no arm reinit"),
        ("LN8", [run(arm(), arm("reinit", 8))], "the arm reinit ends at 16.8 % of the weights, and 13.5 % are needed"),
        ("LN9", [run(arm())], "the run has no arm one-shot"),
        (
            "LN9",
            [run(arm(), [row("one-shot", 1, 0.8), row("one-shot", 2, 0.1)])],
            "the arm one-shot has no level from 17.6 % to 67.5 % of the weights",
        ),
        ("LN12", [run(arm()), sgd(0.4)], "no run with model lenet-300-100, optimizer sgd, lr 0.8"),
        ("LN13", [run(arm())], "one width only"),
        ("LN13", [run(arm(), arm())] * 2, "a run ends before its accuracy is back at that of the dense network"),
        ("LN13", [run(arm(test={0: 0.9, 16: 0.8}))] * 2, "the summary does not count weights"),
        ("CV8", [conv(2), conv(4)], "no run with model conv-6, no dropout"),
        ("CV9", convs(), "no run with model conv-2, dropout"),
        ("CV7", convs(rounds=8), "the arm ticket ends at 16.8 % of the weights, and 3.5 % are needed"),
        ("RN1", [resnet(0.01, warmup=100)], "no run with model resnet-18, lr 0.01, no warmup"),
        ("VG1", [vgg(0.1, 100, rounds=10)], "the arm ticket ends at 10.7 % of the weights, and 1.5 % are needed"),
        (
            "S0-1",
            [run(arm(rounds=18), normalization="none", activation="sigmoid")],
            "no curve of the arm ticket in round 0 was given",
        ),
    ],
)
def test_what_is_missing_is_named(id, runs, why):
    found = verdict(id, *runs)
    assert (found.verdict, found.reason) == ("not measured", why)
    assert found.measured is None and found.n is None


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"iterations": 200}, "iterations is 200, in the paper 50000"),
        ({"dataset": "digits"}, "dataset is digits, in the paper mnist"),
        ({"score": "random"}, "score is random, in the paper magnitude"),
        ({"rewind": 100}, "rewind is 100, in the paper 0"),
        ({"lr": 0.1}, "lr is 0.1, in the paper 0.0012"),
    ],
)
@pytest.mark.parametrize("stop, measured", [(3100, 38), (4900, 2)])
def test_a_run_unlike_the_papers_decides_nothing(changes, why, stop, measured):
    found = verdict("LN1", run(arm(stop={0: 5000, 7: stop}), **changes))
    assert (found.measured, found.verdict, found.reason) == (pytest.approx(measured), "reported", why)


def test_every_run_of_a_claim_must_be_as_the_papers():
    runs = convs()
    runs[0]["settings"]["batch_size"] = 100
    assert verdict("CV8", *runs).reason == "batch_size is 100, in the paper 60"
    changed = resnet(0.1)
    changed["settings"]["milestones"] = [2000, 2500]
    assert verdict("RN2", changed).reason == "milestones is 2000, 2500, in the paper 20000, 25000"
    widths = [width(9000, 0.8), width(9000, 0.8)]
    widths[1]["settings"]["iterations"] = 7
    assert verdict("LN13", *widths).reason == "iterations is 7, in the paper 50000"


def test_n_is_the_smallest_number_of_trials():
    rows = arm(stop={0: 5000, 7: 3100})
    rows[7]["n"], rows[8]["n"] = 2, 1
    assert verdict("LN1", run(rows)).n == 2


def normalized(name, accuracies, gap=0.0, **more):
    """A lenet whose curves are the same in every round: `accuracies` after 5,000, 15,000 and 20,000 iterations."""
    rows = arm(rounds=20, test={0: 0.9, 3: 0.9 + gap, 7: 0.9 + gap}, **more), arm("reinit-chain", test={0: 0.9})
    curve = {"iteration": [5000, 15000, 20000], "test_accuracy": {"mean": accuracies}}
    curves = {"ticket": dict.fromkeys(range(21), curve)}
    return run(*rows, normalization=name, activation="sigmoid") | {"curves": curves}


NORMALIZED = [
    normalized("statistics", [0.971, 0.98, 0.99], 0.03, final={0: 0.981, 7: 0.982, 15: 0.98}, validation={0: 0.979}),
    normalized("half", [0.96, 0.98, 0.99], 0.02),
    normalized("lecun", [0.95, 0.98, 0.99], 0.01),
    normalized("none", [None, 0.89, 0.99]),
]


@pytest.mark.parametrize(
    "id, measured",
    [
        ("S0-1", 89),
        ("S0-2", 97.1),
        ("S0-4", [0, 2, 1, 3]),
        ("S0-5", 1),
        ("S0-6", 0.1),
        ("S0-7", -0.1),
        ("S0-8", 97.9),
    ],
)
def test_claims_about_normalization(id, measured):
    others = [{**given, "settings": given["settings"] | {"activation": "relu"}} for given in NORMALIZED]
    assert judged(id, *others, *NORMALIZED) == (pytest.approx(measured), "reported")


def test_a_curve_that_begins_too_late():
    late = normalized("statistics", [0.9, 0.9, 0.9])
    late["curves"]["ticket"][18] = {"iteration": [6000], "test_accuracy": {"mean": [0.99]}}
    assert verdict("S0-2", late).reason == "the curve of the arm ticket in round 18 has no point up to iteration 5000"


def other(dataset, optimizer, ticket):
    return run(arm(rounds=2, test={0: ticket}), arm("reinit", rounds=2), dataset=dataset, optimizer=optimizer)


@pytest.mark.parametrize(
    "id, runs, measured",
    [
        ("S0-9", [run(arm(test={0: 0.9}), arm("random", test={0: 0.8}))], 10),
        ("S0-10", [run(arm("random", rounds=20, stop={20: 49000}))], 49000),
        ("S2-1", [run(arm(), arm("magnitude-increase", test={0: 0.91}))], 1),
        ("S2-2", [run(arm(), arm("movement", test={0: 0.91}), arm("large-init-large-final", test={0: 0.8}))], [1, -10]),
        ("S2-3", [run(arm(), arm("lrp", test={4: 0.91, 5: 0.1}))], 1),  # 41 % is nearer to 40 % than 33 %
        ("S3-1", [run(arm(test={13: 0.91}))], 1),
        ("S3-2", [run(arm(test={13: 0.91}), arm("reinit", test={13: 0.88})), other("cifar10", "sgd", 0)], 3),
        ("S3-3", [other("mnist", "adam", 0), other("maxgroup", "adam", 0.92), other("cifar10", "sgd", 0)], [2]),
        ("S3-4", [other("fashion-mnist", "sgd", 0.92), other("maxgroup", "sgd", 0.89)], [2, -1]),
    ],
)
def test_claims_of_reports(id, runs, measured):
    assert judged(id, *runs) == (pytest.approx(measured), "reported")


def test_the_score_of_stability_is_an_arm_or_a_setting():
    rows = arm("ticket", rounds=7, test={0: 0.74, 2: 0.73, 7: 0.1})
    settings = {"model": "conv-4", "dataset": "cifar10"}
    alone = run(rows, **settings, score="stability")
    beside = run(arm(test={0: 0.74}), [row | {"arm": "stability"} for row in rows], **settings, score="magnitude")
    for found in (alone, beside):
        assert judged("S4-1", found) == (pytest.approx(74), "reported")
        assert judged("S4-2", found) == (pytest.approx(-1), "reported")
        assert judged("S4-3", found) == (pytest.approx(10), "reported")
    assert verdict("S4-1", run(arm(), **settings, score="magnitude")).verdict == "not measured"


def test_rows_to_print():
    runs = {"": run(arm(test={0: 0.9, 3: 0.91}, stop={0: 5000, 7: 3100}), arm("one-shot", stop={0: 5000}))}
    ids = ["LN1", "LN5", "LN9", "LN8", "CV11", "S1-3"]
    found = claims.rows(claims.score(runs, ids))
    assert [len(line) for line in found] == [len(claims.HEAD)] * 6
    assert found[0][:2] == ("LN1", "lenet iter. r7 Pm=21.1: ES iter reduction vs r0, % (ratio of means)")
    assert [line[2:] for line in found] == [
        ("38", "38", "± 20", "5", "holds"),
        ("0.35", "0", "<= 0.55", "5", "fails"),
        ("17.6, 67.5", "none", "all of it", "5", "fails"),
        ("21.1", "-", "± 2 rounds", "-", "not measured: the run has no arm reinit"),
        ("67.6, 70.9", "-", "± 2", "-", "not measured: no run with model conv-2, no dropout"),
        ("0.3", "1", ">= 0.1", "5", "holds"),
    ]


def test_the_committed_run_of_lenet():
    summary = json.loads(SUMMARY.read_text(encoding="utf-8"))
    found = {v.claim.id: v for v in claims.score({"": summary}, [f"LN{i}" for i in range(1, 12)])}
    rows = {(row["arm"], row["round"]): row for row in summary["rows"]}
    stop = {key: row["early_stop_iteration"]["mean"] for key, row in rows.items()}
    test = {key: 100 * row["test_accuracy"]["mean"] for key, row in rows.items()}
    assert found["LN1"].measured == pytest.approx(100 * (1 - stop["ticket", 7] / stop["ticket", 0]))
    assert found["LN6"].measured == pytest.approx(stop["reinit", 7] / stop["ticket", 7]) and found["LN6"].n == 1
    assert found["LN7"].measured == pytest.approx(test["ticket", 7] - test["reinit", 7])
    assert 99 < found["LN11"].measured <= 100
    assert found["LN9"].reason == found["LN10"].reason == "the run has no arm one-shot"
