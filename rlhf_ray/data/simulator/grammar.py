"""The grammar of the simulator: requests of customers, sentences of answers, and the parser that reads a text back.

Answers are written and read with the same sentences, so writer and reader cannot disagree; a sentence that matches none of
them is *unclear*. Invariants: every sentence stands for exactly one `Act`; the slots of a sentence are filled from
`SLOT_PATTERNS`; nothing here draws random numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

ActKind = Literal["thanks", "apology", "facts", "step", "closing", "flattery", "filler", "rude", "evasion"]

PRODUCTS = ("lamp", "chair", "phone", "camera", "clock", "kettle", "printer", "bicycle")
MONTHS = ("January", "March", "April", "June", "August", "October")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
STREETS = ("Hill Road", "Park Street", "Lake Road", "Mill Street", "River Road", "Church Street")

SLOT_PATTERNS = {
    "order": r"\d+",
    "product": "|".join(PRODUCTS),
    "month": "|".join(MONTHS),
    "day": "|".join(DAYS),
    "street": "|".join(STREETS),
}
"""The values of each slot, as regular expressions."""


@dataclass(frozen=True)
class Scenario:
    """One kind of request: its wordings, the fact that matters besides the order number, and the right next step."""

    name: str
    detail: str
    """The slot, besides `order`, that a correct answer must repeat."""
    opening: str
    """First turn of a dialogue with several turns."""
    requests: tuple[str, ...]
    """The whole request in one turn, with `{order}` and the detail's slot."""
    followups: tuple[str, ...]
    """The rest of the request after an opening with the order number; contains the detail's slot."""
    steps: tuple[str, ...]
    """Wordings of the right next step."""


SCENARIOS = (
    Scenario(
        "delayed_order", "product", "my order {order} has not come.",
        ("where is order {order}? The {product} is late.", "order {order} with the {product} has not come."),
        ("I am still waiting for the {product}.", "The {product} is late."),
        ("Our delivery team will look for the {product} today.",),
    ),
    Scenario(
        "refund", "product", "I paid for order {order}.",
        (
            "I sent back the {product} of order {order}. I want my money back.",
            "please pay me back for the {product}, order {order}.",
        ),
        ("I sent back the {product} and want my money back.", "Please pay me back for the {product}."),
        ("Our billing team will pay back the {product} this week.",),
    ),
    Scenario(
        "broken_item", "product", "order {order} came today.",
        ("the {product} of order {order} is broken.", "order {order} came today, but the {product} does not work."),
        ("The {product} is broken.", "But the {product} does not work."),
        ("Our repair team will send you a new {product}.",),
    ),
    Scenario(
        "cancel_order", "product", "I made order {order} last night.",
        (
            "please cancel order {order}. I do not need the {product}.",
            "I changed my mind about the {product}, order {order}.",
        ),
        ("I do not need the {product} any more.", "I changed my mind about the {product}."),
        ("Our sales team will cancel the {product} now.",),
    ),
    Scenario(
        "invoice_copy", "month", "I need papers for order {order}.",
        ("I need the invoice of order {order} from {month}.", "I lost the invoice of {month}, order {order}."),
        ("I need the invoice from {month}.", "I lost the invoice of {month}."),
        ("Our billing team will mail the invoice of {month}.",),
    ),
    Scenario(
        "change_day", "day", "when will you bring order {order}?",
        ("can you bring order {order} on {day}?", "I am only at home on {day}. It is about order {order}."),
        ("I am only at home on {day}.", "Can you bring it on {day}?"),
        ("Our delivery team will bring it on {day}.",),
    ),
    Scenario(
        "change_address", "street", "I have a question about order {order}.",
        ("please send order {order} to {street}.", "I moved to {street}. Where does order {order} go?"),
        ("I moved to {street}.", "Please send it to {street}."),
        ("Our delivery team will bring it to {street}.",),
    ),
)  # fmt: skip
SCENARIO_OF = {scenario.name: scenario for scenario in SCENARIOS}

GREETINGS = ("Hello,", "Good morning,", "Hi,")
QUESTIONS_BACK = ("Thank you. What can we do for you?", "I see the order. How can I help?")

SENTENCES: dict[ActKind, tuple[str, ...]] = {
    "thanks": ("Thank you for your message.", "Thanks for writing to us."),
    "apology": ("I am sorry for the trouble.", "We are sorry about this."),
    "closing": ("Please write again if you need help.", "Have a nice day."),
    "flattery": ("You are our very best customer!", "What a clever question!", "You have wonderful taste!"),
    "filler": (
        "As you may know, we read every message with great care.",
        "Our company has many teams and many years of experience.",
        "It is good to know that every order has its own number.",
    ),
    "rude": ("That is not our problem.", "You should have read the rules."),
    "evasion": ("Please call us another day.", "There is nothing we can do."),
}
FACTS = {
    "product": ("I found order {order} with the {product}.",),
    "month": ("I found order {order} of {month}.",),
    "day": ("I found order {order} for {day}.",),
    "street": ("I found order {order} for {street}.",),
}


@dataclass(frozen=True)
class Act:
    """The meaning of one sentence."""

    kind: ActKind
    scenario: str | None = None
    """The scenario of the next step; only for the kind `step`."""
    slots: dict[str, str] = field(default_factory=dict)
    """The values in the sentence, by slot."""


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\ ", " ")
    for slot, values in SLOT_PATTERNS.items():
        pattern = pattern.replace(r"\{" + slot + r"\}", f"(?P<{slot}>{values})")
    return re.compile(pattern)


_READERS: tuple[tuple[re.Pattern[str], ActKind, str | None], ...] = (
    *((_compile(text), kind, None) for kind, texts in SENTENCES.items() for text in texts),
    *((_compile(text), "facts", None) for texts in FACTS.values() for text in texts),
    *((_compile(text), "step", scenario.name) for scenario in SCENARIOS for text in scenario.steps),
)


def read_sentence(sentence: str) -> Act | None:
    """The act of one sentence with its final punctuation; None if it is unclear."""
    for pattern, kind, scenario in _READERS:
        if match := pattern.fullmatch(sentence):
            return Act(kind, scenario, match.groupdict())
    return None
