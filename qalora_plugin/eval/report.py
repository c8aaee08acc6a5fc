"""What a verification found, and the bars that it is held against."""

from dataclasses import asdict, dataclass

from qalora_plugin.checkpoint.json_files import strict_json
from qalora_plugin.eval.tables import print_facts

# In units of half a unit in the last place of an offset. (A merge rounds to float32 on the way to float16.)
ROUNDING_BAR = 1.01
# ‖weights' error‖ / ‖what the adapter adds‖. Rounding to float16 costs 2e-4, but more below 6e-5, where float16 loses
# digits: a very small adapter would vanish without any logit showing it.
WEIGHT_BARS = {"float32": 1e-6, "float16": 1e-3}
# Largest difference of a logit that no rounding explains / largest logit, in float32. Or, where a model amplifies every
# error, a share of what rounding its offsets to float16 does to it: what float32 sums do was at most 0.007 of that.
LOGIT_BAR, LOGIT_SHARE = 1e-4, 0.05
# Choices of experts that near ties explain: at an error of 1e-6, one in some ten thousand.
FEW_FLIPS, FLIP_SHARE = 2, 1e-3


@dataclass(frozen=True)
class VerifyReport:
    """What was compared and what was found. Differences are merged − (base + adapter)."""

    base: str
    adapter: str
    merged: str
    tensors: int
    tensors_identical: int
    base_sha256: str
    modules: int
    weight_error_max: float
    """Largest |w' − definition| over all adapted weights, float64, in weight units."""
    weight_error_relative: float
    """‖w' − definition‖ / ‖what the adapter adds‖ over all adapted weights, float64."""
    offset_error: float
    """Largest error of a weight, in units of what half a unit in the last place of its stored offset (or of the factors
    of it), and of the change of its scale where there is one, can do to it."""
    tokens: int
    dtype: str
    logit_difference: float
    """max|Δ logits| / max|logits|, both over all tokens: the relative error in the maximum norm."""
    logit_error: float
    """The same with the merged checkpoint's offsets put to their exact values: what rounding does not explain."""
    logit_sensitivity: float
    """The same with its offsets rounded to float16: how much this model makes of small errors."""
    kl_mean: float
    """Mean KL(base + adapter ‖ merged) a token, nats."""
    top1_agreement: float
    offset_dtype: str
    base_bytes: int
    merged_new_bytes: int
    config_differences: tuple[str, ...] = ()
    """Values in config.json that are not the base's."""
    router_choices: int = 0
    """Of experts, in a mixture-of-experts model: tokens times layers."""
    router_flips: int = 0
    """Those of them that the merged model, its offsets exact, makes differently; it then follows base + adapter."""
    router_flips_by_rounding: int = 0
    """The same with its offsets rounded to float16."""

    @property
    def logit_bar(self) -> float:
        return max(LOGIT_BAR, LOGIT_SHARE * self.logit_sensitivity)

    @property
    def failures(self) -> list[str]:
        """What is wrong, a sentence each. Logits are judged in float32 only: another dtype's noise would hide it."""
        bar, found = WEIGHT_BARS[self.offset_dtype], []
        if self.tensors_identical < self.tensors:
            found.append(f"{self.tensors - self.tensors_identical} base tensors are not the base's: merge again")
        if not self.offset_error <= ROUNDING_BAR:
            found.append(
                f"offsets are off by {self.offset_error:.3g} times their rounding: not this adapter's. Merge again"
            )
        elif not self.weight_error_relative <= bar:
            found.append(
                f"{self.offset_dtype} loses {self.weight_error_relative:.1%} of so small an adapter: merge again with "
                "offset_dtype float32"
            )
        if self.dtype == "float32" and not self.logit_error <= self.logit_bar:
            found.append(
                f"logits differ by {self.logit_error:.3g} where nothing is rounded: the models do not compute the same"
            )
        if self.dtype == "float32" and self.router_flips > max(FEW_FLIPS, FLIP_SHARE * self.router_choices):
            found.append(
                f"{self.router_flips} of {self.router_choices} choices of experts differ where nothing is rounded: the "
                "models do not compute the same"
            )
        return found + [f"config.json has {difference}: merge again" for difference in self.config_differences]

    @property
    def passed(self) -> bool:
        return not self.failures

    def json(self) -> str:
        return strict_json(asdict(self) | {"passed": self.passed, "failures": self.failures})

    def print(self) -> None:
        bar = f"bar: ≤ {self.logit_bar:.3g}" if self.dtype == "float32" else "the bar holds in float32"
        rows = (
            ("merged", self.merged),
            ("base tensors byte-identical", f"{self.tensors_identical} of {self.tensors}"),
            ("sha256 of the base's tensors", self.base_sha256),
            ("adapted linears", str(self.modules)),
            ("offsets, largest error", f"{self.offset_error:.3g} × their rounding to {self.offset_dtype}"
                                       f"   bar: ≤ {ROUNDING_BAR:g}"),
            ("weights' error", f"{self.weight_error_relative:.2g} of the adapter (max {self.weight_error_max:.2g})"
                               f"   bar: ≤ {WEIGHT_BARS[self.offset_dtype]:g}"),
            (f"logits, {self.dtype}, {self.tokens} tokens", f"error beyond rounding {self.logit_error:.3g}   {bar}"),
            ("the rounding moves", f"logits by ≤ {self.logit_difference:.3g}, mean KL {self.kl_mean:.3g} nats, "
                                   f"top-1 agreement {self.top1_agreement:.2%}"),
            ("size", f"{self.base_bytes / 1e6:.1f} MB base + {self.merged_new_bytes / 1e6:.1f} MB offsets"
                     f" ({self.offset_dtype}), {self.merged_new_bytes / self.base_bytes:.1%}"),
            *self._routing(),
            *(("FAILED", failure) for failure in self.failures),
        )  # fmt: skip
        print_facts(f"qalora verify: {'PASSED' if self.passed else 'FAILED'}", rows)

    def _routing(self) -> list[tuple[str, str]]:
        if not self.router_choices:
            return []
        flips = f"{self.router_flips} of {self.router_choices} flip at near ties, {self.router_flips_by_rounding} by"
        return [("choices of experts", f"{flips} the rounding; logits are compared at the same choices")]
