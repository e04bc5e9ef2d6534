"""What experts do: names, roles and evidence."""

from .cards import Example, ExpertCard, ExpertPage, TopicEvidence, TypicalToken
from .naming import ROLES, Thresholds
from .result import Taxonomy
from .taxonomy import name_experts

__all__ = [
    "ROLES",
    "Example",
    "ExpertCard",
    "ExpertPage",
    "Taxonomy",
    "Thresholds",
    "TopicEvidence",
    "TypicalToken",
    "name_experts",
]
