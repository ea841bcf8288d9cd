"""The models of the attention literature: one file per architecture, read top to bottom."""

from pyattn.face import showing
from pyattn.models.bert import (
    Bert,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from pyattn.models.caption import CaptionConfig, ShowAttendTell
from pyattn.models.gpt import GPT, GPTConfig
from pyattn.models.pretrained import PretrainedError
from pyattn.models.rnn import RNNLM, RNNConfig, RNNForSequenceClassification, RNNForTokenClassification
from pyattn.models.seq2seq import Seq2Seq
from pyattn.models.seq2seq_config import Seq2SeqConfig
from pyattn.models.transformer import Transformer, TransformerConfig
from pyattn.models.transformer_xl import TransformerXL, TransformerXLConfig
from pyattn.models.xlnet import XLNet, XLNetConfig, XLNetLMHead
from pyattn.models.xlnet_heads import (
    XLNetForMultipleChoice,
    XLNetForQuestionAnswering,
    XLNetForQuestionAnsweringSimple,
    XLNetForSequenceClassification,
    XLNetForTokenClassification,
)

__all__ = [
    "GPT",
    "RNNLM",
    "Bert",
    "BertConfig",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "CaptionConfig",
    "GPTConfig",
    "PretrainedError",
    "RNNConfig",
    "RNNForSequenceClassification",
    "RNNForTokenClassification",
    "Seq2Seq",
    "Seq2SeqConfig",
    "ShowAttendTell",
    "Transformer",
    "TransformerConfig",
    "TransformerXL",
    "TransformerXLConfig",
    "XLNet",
    "XLNetConfig",
    "XLNetForMultipleChoice",
    "XLNetForQuestionAnswering",
    "XLNetForQuestionAnsweringSimple",
    "XLNetForSequenceClassification",
    "XLNetForTokenClassification",
    "XLNetLMHead",
]

__dir__ = showing(__all__)
