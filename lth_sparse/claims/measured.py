"""How each claim is measured: a function of the evidence for every id.

It returns a number, or a list of them in the order the claim names; for a claim about an interval of levels {level:
whether it holds there}; for one about the first level at which something happens, None where it never does. A maximum
or a level is sought over the whole run, which must go on to where the paper found it.
"""

from statistics import fmean

from .evidence import Evidence, Missing, Rounds

_VALIDATION, _FINAL = "validation_accuracy", "final_test_accuracy"


def _lenet(e: Evidence, arm="ticket", **wanted) -> Rounds:
    return e.arm(arm, model="lenet-300-100", **wanted)


def _conv(e: Evidence, layers, dropout=False) -> Rounds:
    return e.arm(model=f"conv-{layers}", dropout=dropout)


def _convs(e: Evidence, measure, dropout=False) -> list[float]:
    return [measure(_conv(e, layers, dropout)) for layers in (2, 4, 6)]


def _resnet(e: Evidence, lr, warmup=False) -> Rounds:
    return e.arm(model="resnet-18", lr=lr, warmup=warmup)


def _vgg(e: Evidence, lr, warmup=False, scope="global") -> Rounds:
    return e.arm(model="vgg-19", lr=lr, warmup=warmup, scope=scope)


def _most(arm: Rounds, measure) -> float:
    """The highest of a method of `Rounds` over the rounds from 1."""
    return max(measure(arm, round) for round in arm.levels)


def _best(arm: Rounds, measure, rounds=None) -> float:
    return max(arm.at(round, measure) for round in rounds or arm.levels)


def _best_within(arm: Rounds, low, high) -> float:
    return _best(arm, _FINAL, arm.within(low, high))


def _least_trained(arm: Rounds, low) -> float:
    return min(arm.at(round, "train_accuracy") for round in [0, *arm.within(low)])


def _first_below_dense(arm: Rounds, at_latest) -> float | None:
    """The first level less accurate than dense; None if none is, for an arm that comes to `at_latest`."""
    for round, level in arm.levels.items():
        if arm.gain(round) < 0:
            return level
    arm.to(at_latest)
    return None


def _above_dense_down_to(arm: Rounds) -> float:
    """The lowest level to which every one is more accurate than dense: the last that is not, or the end of the run."""
    return max([min(arm.levels.values()), *(level for r, level in arm.levels.items() if arm.gain(r) <= 0)])


def _weights_at_dense_accuracy(e: Evidence) -> list[float]:
    """Weights left in the last round as accurate as dense, by run."""
    arms = [Rounds(e, run, "ticket") for run in e.runs()]
    if len(arms) == 1:
        raise Missing("one width only")
    lasts = [max([0, *(round for round in arm.levels if arm.gain(round) >= 0)]) for arm in arms]
    for arm, last in zip(arms, lasts, strict=True):
        if last == max(arm.rows):
            raise Missing("a run ends before its accuracy is back at that of the dense network")
    return [arm.count(last) for arm, last in zip(arms, lasts, strict=True)]


_LTH = {
    "LN1": lambda e: 100 - 100 / _lenet(e).speedup(7),
    "LN2": lambda e: 1 / _lenet(e).speedup(15),
    "LN3": lambda e: _lenet(e).gain(9),
    "LN4": lambda e: _lenet(e).gain(15),
    "LN5": lambda e: _most(_lenet(e).to(3.6), Rounds.final_gain),
    "LN6": lambda e: _lenet(e, "reinit").stop(7) / _lenet(e).stop(7),
    "LN7": lambda e: _lenet(e).at(7) - _lenet(e, "reinit").at(7),
    "LN8": lambda e: _first_below_dense(_lenet(e, "reinit"), 13.5),
    "LN9": lambda e: _lenet(e, "one-shot").where(lambda arm, r: arm.speedup(r) > 1, 17.6, 67.5),
    "LN10": lambda e: _lenet(e, "one-shot").where(lambda arm, r: arm.gain(r) > 0, 5.17, 95.0),
    "LN11": lambda e: _least_trained(_lenet(e), 5.0),
    "LN12": lambda e: [_lenet(e, optimizer="sgd", lr=lr).to(1.5).sparsest() for lr in (0.4, 0.8)],
    "LN13": _weights_at_dense_accuracy,
    "CV1": lambda e: _most(_conv(e, 2).to(8.8), Rounds.speedup),
    "CV2": lambda e: _most(_conv(e, 4).to(9.2), Rounds.speedup),
    "CV3": lambda e: _most(_conv(e, 6).to(15.3), Rounds.speedup),
    "CV4": lambda e: _most(_conv(e, 2).to(4.6), Rounds.gain),
    "CV5": lambda e: _most(_conv(e, 4).to(11.1), Rounds.gain),
    "CV6": lambda e: _most(_conv(e, 6).to(26.6), Rounds.gain),
    "CV7": lambda e: _convs(e, lambda arm: _above_dense_down_to(arm.to(3.5))),
    "CV8": lambda e: _convs(e, lambda arm: _least_trained(arm, 2.0)),
    "CV9": lambda e: [_conv(e, n, dropout=True).at(0) - _conv(e, n).at(0) for n in (2, 4, 6)],
    "CV10": lambda e: _convs(e, lambda arm: _most(arm.to(15.3), Rounds.gain), dropout=True),
    "CV11": lambda e: [_conv(e, 2).at(0, _VALIDATION), _best(_conv(e, 2).to(8.8), _VALIDATION)],
    "CV12": lambda e: _best(_conv(e, 4).to(5.4), _VALIDATION),
    "CV13": lambda e: _best(_conv(e, 6).to(9.31), _VALIDATION),
    "RN1": lambda e: _best_within(_resnet(e, 0.01), 21.9, 41.7),
    "RN2": lambda e: _resnet(e, 0.1).at(0, _FINAL),
    "RN3": lambda e: _resnet(e, 0.03, warmup=True).at(6, _FINAL),
    "RN4": lambda e: _resnet(e, 0.03, warmup=True).to(11.8).sparsest(_FINAL),
    "VG1": lambda e: _vgg(e, 0.1, warmup=True).to(1.5).sparsest(_FINAL),
    "VG2": lambda e: _vgg(e, 0.1, warmup=True, scope="layer").to(6.9).sparsest(_FINAL),
    "VG3": lambda e: _vgg(e, 0.01).to(3.5).sparsest(_FINAL, loss=1.0),
    "VG4": lambda e: _vgg(e, 0.1, warmup=True).at(0, _FINAL) - _vgg(e, 0.1).at(0, _FINAL),
}


def _supermasks(e: Evidence, name) -> list[float]:
    return [e.supermask(name, dataset=dataset) for dataset in ("mnist", "cifar10")]


_ZHOU = {
    "ZH1": lambda e: _supermasks(e, "large-final-same-sign-constant"),
    "ZH2": lambda e: _supermasks(e, "large-final-same-sign"),
    "ZH3": lambda e: _supermasks(e, "learned"),
    "ZH4": lambda e: [e.supermask("learned-rescaled", model=f"conv-{n}") for n in (2, 4, 6)],
    "ZH5": lambda e: _convs(e, lambda arm: arm.at(0)),
}


def _advantage(arm: Rounds, other: Rounds, rounds=None) -> float:
    """Accuracy of one arm less that of another, the mean over `rounds`, or over all that both have."""
    both = rounds or [round for round in arm.levels if round in other.levels]
    if not both:
        raise Missing(f"the arms {arm.name} and {other.name} have no round in common")
    return fmean(arm.at(round) - other.at(round) for round in both)


def _gap(e: Evidence, rounds=None, **wanted) -> float:
    """Accuracy of the ticket less that of its control, reinitialised on the ticket's masks or on its own."""
    try:
        control = e.arm("reinit", **wanted)
    except Missing:
        control = e.arm("reinit-chain", **wanted)
    return _advantage(e.arm(**wanted), control, rounds)


def _gaps_elsewhere(e: Evidence, optimizer) -> list[float]:
    """The gap on every other data set than that of the ticket."""
    datasets = [run["settings"]["dataset"] for run in e.runs(optimizer=optimizer)]
    found = [_gap(e, optimizer=optimizer, dataset=dataset) for dataset in datasets if dataset != "mnist"]
    if not found:
        raise Missing("no run on another data set than mnist")
    return found


def _ratio_of_stops(arm: Rounds, other: Rounds, rounds) -> float:
    return sum(map(arm.stop, rounds)) / sum(map(other.stop, rounds))


def _mnist(e: Evidence, normalization="statistics", arm="ticket") -> Rounds:
    return _lenet(e, arm, normalization=normalization, activation="sigmoid")  # as that study's networks have it


def _early(e: Evidence, normalization) -> float:
    """The highest test accuracy of the 1.8 % ticket in 5,000 iterations."""
    arm = _mnist(e, normalization)
    return arm.best_until(arm.near(1.85), 5_000)


def _gaps(e: Evidence, normalizations) -> list[float]:
    theirs = {"model": "lenet-300-100", "activation": "sigmoid"}
    return [_gap(e, [3, 7], normalization=given, **theirs) for given in normalizations]


def _stability(e: Evidence) -> Rounds:
    """The arm of |w_best - w_final|, or the ticket of a run with that score."""
    try:
        return e.arm("stability", model="conv-4", dataset="cifar10")
    except Missing:
        return e.arm(model="conv-4", dataset="cifar10", score="stability")


def _gain_near(arm: Rounds, level) -> float:
    return arm.gain(arm.near(level))


def _best_curve(arm: Rounds, iteration) -> float:
    return max(arm.best_until(round, iteration) for round in arm.rows)


_OTHERS = ("none", "half", "lecun")  # normalizations, beside that by the statistics of MNIST
_PLOTTED = (0, 3, 12, 15)  # figure 3, beside round 7
_SEEDS = {
    "S0-1": lambda e: _best_curve(_mnist(e, "none").to(1.9), 15_000),
    "S0-2": lambda e: _early(e, "statistics"),
    "S0-3": lambda e: [_early(e, normalization) for normalization in _OTHERS],
    "S0-4": lambda e: _gaps(e, [*_OTHERS, "statistics"]),
    "S0-5": lambda e: _gaps(e, ["statistics"])[0] - max(_gaps(e, _OTHERS)),
    "S0-6": lambda e: _mnist(e).at(7, _FINAL) - _best(_mnist(e), _FINAL, _PLOTTED),
    "S0-7": lambda e: _mnist(e).final_gain(15),
    "S0-8": lambda e: _mnist(e).at(0, _VALIDATION),
    "S0-9": lambda e: _advantage(_lenet(e).to(3.6), _lenet(e, "random")),
    "S0-10": lambda e: _most(_lenet(e, "random").to(1.2), Rounds.stop),
    "S1-1": lambda e: _gap(e, _lenet(e).within(3.6, 21.1), model="lenet-300-100"),
    "S1-2": lambda e: _ratio_of_stops(_lenet(e, "reinit"), _lenet(e), _lenet(e).within(3.6, 21.1)),
    "S1-3": lambda e: _most(_lenet(e).to(3.6), Rounds.gain),
    "S2-1": lambda e: _advantage(*e.beside("magnitude-increase")),
    "S2-2": lambda e: [_advantage(*e.beside(name)) for name in ("movement", "large-init-large-final")],
    "S2-3": lambda e: _gain_near(e.arm("lrp"), 40.0),
    "S3-1": lambda e: _gain_near(e.arm(dataset="mnist"), 5.0),
    "S3-2": lambda e: _gap(e, [e.arm(dataset="mnist").near(5.0)], dataset="mnist"),
    "S3-3": lambda e: _gaps_elsewhere(e, "adam"),
    "S3-4": lambda e: _gaps_elsewhere(e, "sgd"),
    "S4-1": lambda e: _stability(e).at(0),
    "S4-2": lambda e: _gain_near(_stability(e), 60.0),
    "S4-3": lambda e: _stability(e).to(25.0).at(max(_stability(e).levels)),
}

MEASURED = _LTH | _ZHOU | _SEEDS
