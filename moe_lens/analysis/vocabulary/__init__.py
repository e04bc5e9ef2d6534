"""Which tokens experts are chosen for, and which tokens they push: vocabulary of experts.

    routed = routed_vocabulary(count_ids(trace))                  # by routing, from a trace
    written = written_vocabulary(effects, reading, texts)         # by contribution, from a model
    Vocabulary.of(routed, written)                                # both, as `moe-lens vocab` shows

* *By routing* (OLMoE, arXiv 2409.02060, Eq. 8): of the tokens with id x, the share that an expert
  gets; x is the token read, the next one of the text, or the one that the model predicts.
* *By contribution*: how what the expert adds to the residual stream changes the logits directly,
  through the model's own final norm and head.

The two need not agree: one is about what goes in, the other about what comes out.
"""

from .cards import DirectionTokens, ExpertCard, TokenCard, expert_card, token_card
from .counting import IDS, IdCounts, count_ids
from .overview import Vocabulary
from .routed import RoutedVocabulary, routed_vocabulary
from .token_text import token_of
from .written import Reading, WrittenVocabulary, written_vocabulary

__all__ = [
    "IDS",
    "DirectionTokens",
    "ExpertCard",
    "IdCounts",
    "Reading",
    "RoutedVocabulary",
    "TokenCard",
    "Vocabulary",
    "WrittenVocabulary",
    "count_ids",
    "expert_card",
    "routed_vocabulary",
    "token_card",
    "token_of",
    "written_vocabulary",
]
