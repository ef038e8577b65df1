"""What a verification says of the forgetting itself, as types. Shares are counts, so that whoever
reads them can set an interval around each.
"""

from __future__ import annotations

from dataclasses import dataclass

from bake.recipe import PromptForm
from verify.compare.loss_split import LossHistogram, LossSplit
from verify.report.intervals import Interval, McNemar, wilson


@dataclass(frozen=True)
class Share:
    """So many right of so many."""

    right: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.n:
            raise ValueError(f"{self.right} right of {self.n}; expected 0 to {self.n}")

    @property
    def accuracy(self) -> float | None:
        """0 to 1; None of no questions."""
        return self.right / self.n if self.n else None

    @property
    def interval(self) -> Interval | None:
        """Wilson's 95 % interval of the accuracy; None of no questions."""
        return wilson(self.right, self.n) if self.n else None


@dataclass(frozen=True)
class Items:
    """How much was measured on."""

    forget_questions: int
    retain_questions: int
    text_tokens: int
    """Tokens whose cross-entropy was taken."""
    one_in: int = 1
    """Of the recipe's questions, texts and prompts one in so many: a budget's share."""


@dataclass(frozen=True)
class FiredText:
    """One example sequence, and the tokens of it on which the clamp fired."""

    source: str
    """forget | retain | text."""
    form: str
    """A key of `FORMS`, or text."""
    row: int
    """Row of the source, from 1."""
    tokens: tuple[str, ...]
    """As the tokenizer writes them, BOS first."""
    fired: tuple[int, ...]
    """Positions in `tokens`, from 0."""


@dataclass(frozen=True)
class SubjectShare:
    """One subject's part of a set of questions."""

    subject: str
    """As prompts name it; "" where questions name none."""
    share: Share


@dataclass(frozen=True)
class Calibration:
    """How a model writes its letter: bare ("A") or after a space (" A")."""

    bare_mass: float
    """Mean probability of the four bare letters together, 0 to 1."""
    spaced_mass: float
    """The same of the four letters after a space."""
    bare_first: float
    """Share of questions on which the winning letter is likelier bare."""
    agree: float
    """Share of questions on which both would choose the same letter."""


@dataclass(frozen=True)
class TextShares:
    """How many questions are answered right by the likelihood of choices' texts, by what it is
    divided by.
    """

    summed: Share
    """Nothing: `acc` of lm-evaluation-harness."""
    per_character: Share
    """The length of the text in characters: its `acc_norm`. This one decides."""
    per_token: Share
    """The length in tokens."""


@dataclass(frozen=True)
class AnswerSet:
    """What one engine answered to one set of questions in one prompt form."""

    source: str
    """forget | retain."""
    form: str
    """A key of `bake.questions.forms.FORMS`."""
    share: Share
    known: Share | None
    """Over the questions that the base knows, as `KnownSet` has it; None where that was not
    asked."""
    letters: tuple[int, int, int, int]
    """How often each of A to D was said; 0 each in a form that asks for no letter."""
    only_letter: str | None
    """The letter of at least 90 % of the answers: a model that says it has lost the format."""
    subjects: tuple[SubjectShare, ...]
    change: McNemar | None
    """Against the base, item by item; the base's own is None."""
    calibration: Calibration | None
    """Chat form only, and only of a tokenizer that has both kinds of letters."""
    by_text: TextShares | None = None
    """Of a form that asks for no letter."""


@dataclass(frozen=True)
class LossAdded:
    """An engine's loss on text against the base's, token by token."""

    split: LossSplit
    histogram: LossHistogram
    interval: Interval | None = None
    """Of the mean over all tokens, by bootstrap over windows of text; None where a loss is not
    finite."""
    rounding: float = 0.0
    """The most by which rounding alone may change the loss of a token, in nats."""
    texts: tuple[TextLoss, ...] = ()
    """On the recipe's other texts."""


@dataclass(frozen=True)
class TextLoss:
    """Loss added on one of the recipe's other texts."""

    name: str
    tokens: int
    added: float
    """Nats per token."""


@dataclass(frozen=True)
class KnownSet:
    """A set of questions under the 24 orders of their choices, in chat form; or once, in a form in
    which order has no meaning.
    """

    source: str
    """forget | retain."""
    asked: int
    known: int
    """Questions that the base answers right in every order, or the one time."""
    engine: str
    """Which engine was asked them after the base."""
    still_known: Share
    """Of the known ones, those that it too answers right in every order."""
    orders: Share
    """The same, counting each order of each known question by itself."""
    form: PromptForm = "chat"
    """In which it was asked."""


@dataclass(frozen=True)
class Guess:
    """What guessing gives on a set of questions, 0 to 1."""

    source: str
    """forget | retain, or a task."""
    n: int
    """Questions."""
    at_random: float
    longest: float
    """Always the longest choice, in characters; one of several at random."""
    unasked: float | None = None
    """What the base says to the choices without the question; None where it was not asked."""


@dataclass(frozen=True)
class Control:
    """The hooked model with something else in the clamp's place."""

    name: str
    """reconstruction | zero | random_decoder | random_features."""
    forget: Share | None
    """In the prompt form that leads."""
    retain: Share | None
    loss_added: float | None
    """Nats per token."""


@dataclass(frozen=True)
class Continuation:
    """What one variant went on with."""

    variant: str
    """base | reconstruction | unlearned | prompted."""
    text: str
    right: bool | None
    """It holds one of the expected answers; None where none is expected."""
    on_topic: bool
    """It refers to the topic."""


@dataclass(frozen=True)
class Completion:
    """One prompt, and every variant's continuation of it."""

    source: str
    """topic | generic."""
    row: int
    """Row of its source, from 1."""
    prompt: str
    expected: tuple[str, ...]
    continuations: tuple[Continuation, ...]


@dataclass(frozen=True)
class Tally:
    """One variant over all prompts of a source."""

    source: str
    variant: str
    right: Share | None
    """Over the prompts that expect an answer; None where none does."""
    on_topic: Share
    as_base: Share
    """Continuations that are the base's, token for token."""


@dataclass(frozen=True)
class Continued:
    """One engine on the prompts of the completions."""

    engine: str
    topic: Share | None
    """Right answers, over the prompts on the topic that expect one; None where there are none."""
    generic: Share | None
    """The same over the others."""
    as_reference: Share
    """Continuations that are the reference's, token for token."""


@dataclass(frozen=True)
class TokenShift:
    """A token, and its mean probability as the next one after the prompts on the topic."""

    token: str
    before: float
    """The base's, 0 to 1."""
    after: float
    """Once unlearned, 0 to 1."""


@dataclass(frozen=True)
class Trivia:
    """One variant on questions with two choices, A and B at random."""

    variant: str
    share: Share
    letters: tuple[int, int]
    """How often A and B were said."""


@dataclass(frozen=True)
class Completions:
    """Greedy continuations of a few tokens, variants side by side."""

    engine: str
    """The engine that `unlearned` stands for."""
    max_new_tokens: int
    instruction: str
    """What `prompted` was told."""
    prompts: tuple[Completion, ...]
    """Empty where the recipe names none."""
    tallies: tuple[Tally, ...]
    falls: tuple[TokenShift, ...]
    """The tokens whose probability falls most, the largest fall first."""
    rises: tuple[TokenShift, ...]
    trivia: tuple[Trivia, ...]
    engines: tuple[Continued, ...] = ()
    """The reference and the folder's engines on the same prompts."""


@dataclass(frozen=True)
class Attack:
    """One way to get at what was to be forgotten, weights unchanged."""

    name: str
    """as asked | reworded: NAME | hints | padding | suffix | weights: ENGINE."""
    how: str
    """What was done, in a sentence."""
    base: Share | None
    """The base's answers to the same prompts."""
    unlearned: Share | None
    """None where it was not measured; `how` says why."""


@dataclass(frozen=True)
class Robustness:
    """Forget accuracy under attack."""

    engine: str
    """The engine that was attacked."""
    form: str
    """In which it was asked."""
    attacks: tuple[Attack, ...]


@dataclass(frozen=True)
class HarnessScore:
    """One engine's accuracy in a task of lm-evaluation-harness, as it states it."""

    task: str
    accuracy: float
    stderr: float | None
    n: int | None
    """Questions; None of a group of tasks."""
    guess: Guess | None = None
    """What guessing gives there; None where its choices are not known."""
