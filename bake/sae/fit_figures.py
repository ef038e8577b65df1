"""How well an SAE fits a checkpoint, in figures, and from which of them on it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_EXPLAINED = 0.0
"""Least share of the variance that a sound SAE explains, plain and per standardised dimension:
one that explains less says less of an activation than the mean of all of them."""
LEAST_AGREEMENT = 6.0
"""From how many standard deviations on encoder columns and decoder rows point the same way: below,
an SAE's directions are random, and nothing can be said of where it belongs."""
TIED = 0.95
"""From which median cosine on an encoder is the decoder transposed, as SAEs are initialised: it
counts as random directions do. Trained ones were seen at 0.1 to 0.5."""
CLEARLY_MORE = 0.05
"""By how much more an SAE must explain elsewhere, of either variance, to belong there."""
AGREEING = 1024
"""Most features that are looked at for it."""
UNMEASURED = (
    "not measured; it cannot be of a slice of an SAE, of one whose encoder and decoder agree no "
    "more than random directions do or are the same, or of a base without tokenizer"
)
"""What is said where there are no figures."""


@dataclass(frozen=True)
class Fit:
    """What an SAE makes of a checkpoint's activations on a text."""

    tokens: int
    """On which it was measured, without BOS, EOS and PAD."""
    variance_explained: float | None
    """1 − |x − x̂|² / |x − mean|², both summed over tokens and dimensions; None where not finite."""
    standardised: float | None
    """The same of each dimension by itself, on the average over dimensions: a few large ones do not
    hide the others."""
    l0: float
    """Features that fire on a token, on the average."""
    dead: float
    """Share of the features that fire on none of the tokens."""
    agreement: float
    """How far encoder columns and decoder rows point the same way, in standard deviations of what
    random directions show; 0 where they are the same."""
    elsewhere: str | None = None
    """Of what beside its hook point it explains clearly more, if it does."""

    @classmethod
    def of(
        cls,
        n: int,
        errors: list[float],
        variances: list[float],
        *,
        l0: float,
        dead: float,
        agreement: float,
    ) -> Fit:
        """The figures of sums that whoever measured took.

        Args:
            n: tokens.
            errors: [d_in], squared errors summed over tokens.
            variances: [d_in], squared distances to the mean, likewise. A dimension that does not
                vary is left out.
            l0: features that fire on a token.
            dead: share of the features that never fire.
            agreement: of encoder and decoder.
        """
        shares = [1 - e / v for e, v in zip(errors, variances, strict=True) if v > 0 or v != v]
        total = math.fsum(variances)
        plain = 1 - math.fsum(errors) / total if total else math.nan
        each = math.fsum(shares) / len(shares) if shares else math.nan
        l0, dead, agreement = (float(f"{of:.4g}") for of in (l0, dead, agreement))
        return cls(n, _short(plain), _short(each), l0, dead, agreement)

    def clearly_above(self, other: Fit) -> bool:
        """Whether this one explains clearly more than another of the same tokens."""
        return all(
            one is not None and (two is None or one > two + CLEARLY_MORE)
            for one, two in (
                (self.variance_explained, other.variance_explained),
                (self.standardised, other.standardised),
            )
        )

    @property
    def explains(self) -> bool:
        """Whether it explains as much of the variance as a sound SAE."""
        return all(
            share is not None and share >= LEAST_EXPLAINED
            for share in (self.variance_explained, self.standardised)
        )

    @property
    def trained(self) -> bool:
        """Whether its directions are more than random ones."""
        return self.agreement >= LEAST_AGREEMENT

    @property
    def unfit(self) -> bool:
        """Whether it is of another place. One of random directions belongs nowhere."""
        return self.trained and not (self.explains and self.elsewhere is None)

    @property
    def said(self) -> str:
        """The figures, in words."""
        plain, each = (
            "not finite" if share is None else f"{share:.3f}"
            for share in (self.variance_explained, self.standardised)
        )
        said = (
            f"variance explained {plain}, per standardised dimension {each}; L0 {self.l0:.1f}, "
            f"{self.dead:.0%} of the features on none of {self.tokens:,} tokens"
            f"{'' if self.elsewhere is None else f'; clearly more of {self.elsewhere}'}"
        )
        if self.trained or self.explains:
            return said
        return (
            f"{said}; it is no trained SAE, its encoder and decoder agreeing no more than random "
            "directions do, so that nothing can be said of where it belongs"
        )

    @property
    def as_baked(self) -> str:
        """The same of an SAE that was baked: where it does not fit, that was asked for."""
        chosen = ": it does not fit, and was baked with --unfit all the same"
        return f"{self.said}{chosen if self.unfit else ''}"

    @property
    def as_told(self) -> str:
        """The same as a folder repeats it, where nobody else measured it."""
        return f"by the word of whoever baked it, {self.as_baked}"


def _short(share: float) -> float | None:
    """Four digits: further ones are another machine's."""
    return float(f"{share:.4g}") if math.isfinite(share) else None
