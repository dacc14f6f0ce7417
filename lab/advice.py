"""What the lines of layers.jsonl advise at the end of a watched run: one sentence where something is clearly wrong.

An advice is a row of ADVICE: a function from what was watched to a sentence, with its number and the flags that would
help, or None. It looks at one thing that goes wrong, over all layers, and names the worst one. Thresholds are set so
that a run that rounding does not harm is told nothing; experiments/advice.py shows for each advice a run in which
following it helps, and one in which it says nothing.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from low_precision.errors import SettingError
from low_precision.formats import Format, format_named
from low_precision.rounding import Rounding, is_random
from low_precision.rules import Rule, rule_of
from settings.config import Config

Line = dict[str, Any]  # of layers.jsonl

LOST_LENGTH = 0.25  # of the way that all updates of a run would have gone
VANISHED, FLUSHED, SATURATED, BIASED = 0.1, 0.2, 0.01, 0.02
NO_SIGNAL_DB = 6.0  # where the noise of rounding is half as large as the signal
OUTLIER_DB = 12.0  # a site's noise is four times as large, beside its signal, as that of the others
HALF_THE_NOISE_DB = 3.0
BACKWARD = ("errors", "gradients", "dgrad.errors", "wgrad.errors")  # what a loss scale lifts
TO_ONE_SIDE = (Rounding.TOWARD_ZERO, Rounding.UP, Rounding.DOWN)


@dataclass(frozen=True)
class Watched:
    """The lines of a run, by layer and site, in the order of the steps; without those of what was only tried."""

    config: Config
    lines: dict[tuple[str, str], list[Line]]
    rules: dict[tuple[str, str], Rule]

    @classmethod
    def of(cls, config: Config, lines: Iterable[Line]) -> Watched:
        places: dict[tuple[str, str], list[Line]] = defaultdict(list)
        for line in lines:
            if "also" not in line and "rule" in line:
                line.pop("exponents", None)  # which are most of it
                places[line["layer"], line["site"]].append(line)
        rules = {place: rule for place, of_place in places.items() if (rule := _rule(of_place[-1]["rule"]))}
        return cls(config, {place: places[place] for place in rules}, rules)

    def rule(self, place: tuple[str, str]) -> Rule:
        return self.rules[place]

    def mean(self, place: tuple[str, str], name: str) -> float | None:
        """Of the lines that have this number."""
        values = [line[name] for line in self.lines[place] if line.get(name) is not None]
        return statistics.fmean(values) if values else None

    def over(self, name: str, least: float, sites: Iterable[str] | None = None) -> dict[tuple[str, str], float]:
        """The places where the mean of this number reaches `least`, the worst one first."""
        means = {place: self.mean(place, name) for place in self.lines if sites is None or place[1] in sites}
        reached = {place: value for place, value in means.items() if value is not None and value >= least}
        return dict(sorted(reached.items(), key=lambda item: -item[1]))


def advice(config: Config, lines: Iterable[Line]) -> list[str]:
    """The sentences for a run with these settings, of the lines of its layers.jsonl. At most one a row."""
    watched = Watched.of(config, lines)
    for rows in (FIRST, ADVICE, OTHERWISE):
        if sentences := [sentence for row in rows if (sentence := row(watched))]:
            return sentences
    return []


def zero_weights(watched: Watched) -> str | None:
    """Weights that were zero from the first step on: then all that is behind them is zero too."""
    places = [(layer, site) for layer, site in watched.lines if site == "weights"]
    places = [p for p in places if _no_scale(watched.rule(p)) and all(map(_is_zero, watched.lines[p]))]
    if not places:
        return None
    layer, site = places[0]
    rule = watched.rule(places[0])
    text = f"{site} of {_layers(layer, len(places))}: all of them are zero in {rule.format}, in every step"
    return (
        f"{text}: {_options(watched, *_scaled(watched, site, rule), 'a format with smaller numbers')} would keep them"
    )


def vanished_moment(watched: Watched) -> str | None:
    """Adam divides by the root of its second moment. Where that alone became zero, a step has no bounds."""
    vanished: dict[tuple[str, str], tuple[float, int]] = {}
    for (layer, site), lines in watched.lines.items():
        if site == "momentum.exp_avg_sq" and _no_scale(watched.rule((layer, site))):
            first = {x["step"]: x["flushed"] for x in watched.lines.get((layer, "momentum.exp_avg"), [])}
            vanished[layer, site] = max((x["flushed"] - first.get(x["step"], 0.0), x["step"]) for x in lines)
    places = {place: of_place for place, of_place in vanished.items() if of_place[0] >= VANISHED}
    if not places:
        return None
    (layer, site), (share, step) = max(places.items(), key=lambda item: item[1][0])
    text = f"{site} of {_layers(layer, len(places))}: {share:.0%} of it became zero in step {step}, where exp_avg did"
    text += f" not, in {watched.rule((layer, site)).format}, and steps are divided by its root"
    return f"{text}: {_options(watched, _site_flag(watched, site, 'bfloat16'))} would keep it"


def lost_updates(watched: Watched) -> str | None:
    """Of rounding to nearest: updates below half of the format's gap leave the weight where it is."""
    lost: dict[str, tuple[float, Line, Rule]] = {}
    for layer in {layer for layer, site in watched.lines if site == "weights"}:
        kept = [site for site in ("compensation", "accumulator", "weights") if (layer, site) in watched.lines]
        place = layer, kept[0]  # what stands behind the weights has what they lose
        length, missing = 0.0, 0.0
        for line in watched.lines[place]:
            norm = line.get("update_norm") or 0.0
            length += norm
            missing += norm * (1 - (line.get("arrived_norm") or 0.0) * (line.get("update_cosine") or 0.0))
        rule = watched.rule(place)
        if length and missing / length >= LOST_LENGTH and not is_random(rule.rounding):
            lost[layer] = missing / length, watched.lines[place][-1], rule
    if not lost:
        return None
    layer, (share, last, rule) = max(lost.items(), key=lambda item: (item[1][0], item[0]))
    site, since = last["site"], last.get("last_moved")
    text = f"{site} of {_layers(layer, len(lost))}: "
    if (last["lost_updates"] or 0.0) >= LOST_LENGTH:
        text += f"{last['lost_updates']:.0%} of the updates were lost in step {last['step']}"
        if since is not None and since < last["step"]:
            text += f", and none has moved since step {since}" if since else ", and none has ever moved"
    else:  # a scale that moves takes all weights of its group with it
        text += f"{min(share, 1.0):.0%} of the way that the updates would have gone was lost to rounding"
    options = [_rounded(watched, site, rule, Rounding.STOCHASTIC)]
    options.append(_site_flag(watched, "accumulator", _wider(rule)) if site == "weights" else f"--site {site}=float32")
    return f"{text}: {_options(watched, *options)} would keep them"


def flushed(watched: Watched) -> str | None:
    """Gradients and errors that are smaller than the format's smallest number, and nothing lifts them.

    Stochastic rounding makes most of them zero too, but their mean is right.
    """
    places = watched.over("flushed", FLUSHED, BACKWARD)
    places = {p: share for p, share in places.items() if _no_scale(watched.rule(p)) and _is_noisy(watched, p)}
    places = {p: share for p, share in places.items() if not is_random(watched.rule(p).rounding)}
    if not places or watched.config.loss_scale == "dynamic":
        return None
    (layer, site), share = next(iter(places.items()))
    rule = watched.rule((layer, site))
    text = f"{site} of {_layers(layer, len(places))}: {share:.0%} of them became zero in {rule.format}"
    return f"{text}: {_options(watched, '--loss-scale dynamic', *_scaled(watched, site, rule))} would keep them"


def saturated(watched: Watched) -> str | None:
    """Numbers beyond the format's largest one."""
    places = {p: share for p, share in watched.over("saturated", SATURATED).items() if _no_scale(watched.rule(p))}
    if watched.config.loss_scale == "dynamic":  # which looks for its place in the first steps
        places = {p: share for p, share in places.items() if p[1] not in BACKWARD or _is_usual(watched, p)}
    if not places:
        return None
    (layer, site), share = next(iter(places.items()))
    rule = watched.rule((layer, site))
    amax = max(line["amax"] or 0.0 for line in watched.lines[layer, site])
    assert isinstance(rule.format, Format)
    text = f"{site} of {_layers(layer, len(places))}: {share:.1%} of them are beyond {rule.format.largest:g}, where"
    text += f" {rule.format} ends (up to {amax:.3g})"
    scale, options = watched.config.loss_scale, ["a format that reaches further", *_scaled(watched, site, rule)]
    if site in BACKWARD and scale != "dynamic" and float(scale) > 1:
        options = [f"a --loss-scale below {float(scale):g}", "--loss-scale dynamic"]
    return f"{text}: {_options(watched, *options)} would keep them"


def biased(watched: Watched) -> str | None:
    """Rounding to one side, which shifts every number the same way; weights again in each step."""
    shifts = {}
    for place, lines in watched.lines.items():
        if watched.rule(place).rounding in TO_ONE_SIDE and (bias := watched.mean(place, "bias")):
            times = lines[-1]["step"] if place[1] in ("weights", "accumulator") else 1
            shifts[place] = bias, times, abs(bias) * times
    places = {place: shift for place, shift in shifts.items() if shift[2] >= BIASED}
    if not places:
        return None
    (layer, site), (bias, times, _) = max(places.items(), key=lambda item: item[1][2])
    rule, rounding = watched.rule((layer, site)), watched.rule((layer, site)).rounding
    way = "small" if rounding is Rounding.TOWARD_ZERO else "low" if bias < 0 else "high"
    often = f"in each of {times} steps, on average" if times > 1 else "on average"
    text = f"{site} of {_layers(layer, len(places))}: {rounding} makes them {100 * abs(bias):.2g}% too {way} {often}"
    options = [_rounded(watched, site, rule, other) for other in (Rounding.NEAREST, Rounding.STOCHASTIC)]
    return f"{text}: {_options(watched, *options)} would not"


def one_site(watched: Watched) -> str | None:
    """One site, in one layer or more, that is lost in noise while no other is half as noisy.

    Noise of stochastic rounding is left out: its mean is right, and what adds up numbers of it has less.
    """
    ratios = {place: watched.mean(place, "sqnr_db") for place in watched.lines}
    known = {p: ratio for p, ratio in ratios.items() if ratio is not None and not is_random(watched.rule(p).rounding)}
    (layer, site) = worst = min(known, key=lambda place: known[place], default=("", ""))
    noisy = [place for place, ratio in known.items() if place[1] == site and ratio < NO_SIGNAL_DB]
    others = [ratio for place, ratio in known.items() if place not in noisy]
    of_other_sites = [ratio for place, ratio in known.items() if place[1] != site]
    if not noisy or not others or min(of_other_sites, default=math.inf) - known[worst] < HALF_THE_NOISE_DB:
        return None
    middle = statistics.median(others)
    if middle - known[worst] < OUTLIER_DB:
        return None
    flag = _site_flag(watched, site, "bfloat16", f"{layer}/" if layer and len(noisy) == 1 else "")
    text = f"{site} of {_layers(layer, len(noisy))}: a signal-to-noise ratio of {known[worst]:.0f} dB, of the others"
    return f"{text} {middle:.0f} dB (median): {_options(watched, flag)} would keep more"


def not_finite(watched: Watched) -> str | None:
    """Infinities and NaN; a dynamic loss scale meets some while it looks for its place."""
    places = {place for place, lines in watched.lines.items() if any(line.get("not_finite") for line in lines)}
    if not places or watched.config.loss_scale == "dynamic":
        return None
    lines = [line for place in places for line in watched.lines[place] if line.get("not_finite")]
    first = min(lines, key=lambda line: line["step"])
    scale, overflow = float(watched.config.loss_scale), watched.config.overflow
    text = (
        f"{first['site']} of {_layers(first['layer'], len(places))}: {first['not_finite']:.1%} of them are not finite"
    )
    text += f" in step {first['step']}"
    if scale > 1:
        options = [f"a --loss-scale below {scale:g}", "--loss-scale dynamic"]
        return f"{text}: {_options(watched, *options)} would keep them"
    if overflow != "saturate":
        return f"{text}: --overflow saturate, or a format that reaches further, would keep them"
    return f"{text}: a --learning-rate below {watched.config.learning_rate:g} may help"


Row = Callable[[Watched], str | None]
FIRST: tuple[Row, ...] = (zero_weights, vanished_moment)  # what makes the others speak, of what comes of it
ADVICE: tuple[Row, ...] = (
    not_finite,
    saturated,
    flushed,
    lost_updates,
    biased,
)
OTHERWISE: tuple[Row, ...] = (one_site,)  # where none of those knows a reason


def _rule(text: str) -> Rule | None:
    """What rounds an operand, after what it reads, if that is another one. None where nothing does or none is known."""
    try:
        return rule_of(text.rpartition(">")[2])
    except SettingError:  # it is another operand's, or of a file that is gone
        return None


def _layers(layer: str, count: int) -> str:
    name = layer or "the model"
    return name if count == 1 else f"{name}, and {count - 1} more like it"


def _no_scale(rule: Rule) -> bool:
    return isinstance(rule.format, Format)


def _options(watched: Watched, *options: str) -> str:
    """Those that the run's other settings allow, joined. What is no flag alone is always allowed."""
    allowed = [option for option in options if not option.startswith("--") or _is_allowed(watched.config, option)]
    return " or ".join(allowed) or "a wider format"


def _is_allowed(config: Config, option: str) -> bool:
    """Whether the run could be started with this flag too."""
    flag, value = shlex.split(option)
    name, settings = flag.removeprefix("--").replace("-", "_"), config.as_dict()
    if name == "site":
        left_side = value.partition("=")[0]
        settings["site"] = (*(text for text in config.site if text.partition("=")[0] != left_side), value)
    try:
        Config.make(**settings if name == "site" else settings | {name: value})
    except SettingError:
        return False
    return True


def _site_flag(watched: Watched, site: str, rule: str, pattern: str = "") -> str:
    """The flag that rounds a site in this way. pattern: only in some modules."""
    if watched.config.lines() and not pattern:
        pattern = "*/"  # over what there is for single modules
    text = f"{pattern}{site}={rule}"
    return f"--site {shlex.quote(text)}"


def _rounded(watched: Watched, site: str, rule: Rule, rounding: Rounding) -> str:
    """The flag that rounds a site so in its format: --rounding, unless its --site names a rounding."""
    flag, rule = f"--rounding {rounding}", replace(rule, rounding=rounding)
    if watched.config.lines() or not _is_allowed(watched.config, flag):
        return _site_flag(watched, site, str(rule))
    reaches_it = replace(watched.config, rounding=str(rounding)).rules().get(site) == rule
    return flag if reaches_it else _site_flag(watched, site, str(rule))


def _wider(rule: Rule) -> str:
    """A format for the master copy of weights in this one: with three bits more at least."""
    element = rule.format if isinstance(rule.format, Format) else getattr(rule.format, "element", None)
    return "float16" if not isinstance(element, Format) or element.mantissa_bits <= 6 else "float32"


def _scaled(watched: Watched, site: str, rule: Rule) -> list[str]:
    """The flag that gives the numbers of this format a scale that fits, where there is one and one scale will do."""
    if site.startswith("momentum"):  # squares of gradients reach over more than 8 bits hold, wherever they begin
        return [_site_flag(watched, site, "bfloat16")]
    assert isinstance(rule.format, Format)
    names = [str(rule.format), f"int{rule.format.mantissa_bits + 2}"]  # fixed point becomes whole numbers, scaled
    for name in names if rule.format.exponent_bits else names[1:]:
        try:
            return [_site_flag(watched, site, str(format_named(f"{name}@tensor")))]
        except SettingError:
            continue
    return []


def _is_usual(watched: Watched, place: tuple[str, str]) -> bool:
    """Whether in half of the steps at least, a share of SATURATED was beyond the end."""
    return statistics.median(line["saturated"] or 0.0 for line in watched.lines[place]) >= SATURATED


def _is_zero(line: Line) -> bool:
    """Whether there was nothing but zeros before rounding. Of pairs of numbers (collage) that is not known."""
    return line.get("amax") == 0 and not line["not_finite"]


def _is_noisy(watched: Watched, place: tuple[str, str]) -> bool:
    """Whether what became zero was a large part of the signal. A long tail of tiny numbers is not."""
    ratio = watched.mean(place, "sqnr_db")
    return ratio is None or ratio < NO_SIGNAL_DB
