"""What Qwen3 is trained on, token by token, with its real ids: * is a token with loss.

`qwen3/tokenizer.json` is the part of Qwen3's own tokenizer (Apache 2.0) that these texts need: the 256 bytes, the
tokens in the texts with those they are merged from, and the markers, all under their own ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.chat.parse import parse_conversation
from llm_training_toolkit.data.prepare.renderer import DocumentRenderer
from llm_training_toolkit.data.sources import Document, RepositoryFile
from llm_training_toolkit.data.tokenizer import TokenizationSpec, open_tokenizer
from llm_training_toolkit.families import find_size

QWEN3 = Path(__file__).parent / "qwen3"
SAID = {"role": "assistant", "content": "4", "reasoning_content": "Add."}
CHAT = {"messages": [{"role": "user", "content": "2+2?"}, SAID, {"role": "user", "content": "Why?"}, SAID]}
CODE = Document(0, "a.py", "def f(x):\n    return x\n", "me/app", "a.py")
REPOSITORY = Document(
    0, "me/app", "", "me/app", "", None, (RepositoryFile("a.py", "x = 1\n"), RepositoryFile("b.py", "y = 2"))
)


def shown(document: Document, **source: Any) -> list[str]:
    """The one example of a document: loss, id and text of every token."""
    encoder = open_tokenizer(str(QWEN3))
    chosen = SourceConfig.model_validate({"path": "x", **source})
    renderer = DocumentRenderer(
        [chosen], TokenizationSpec.from_family(find_size("qwen3-0.6b").family), encoder, QWEN3, 64
    )
    [rendered] = renderer.render_documents(0, [(0, document)], seed=1, epoch=0, plain=False)
    [example] = rendered.examples
    pairs = zip(example.tokens.tolist(), example.loss.tolist(), strict=True)
    return [f"{'*' if loss else ' '} {token:>6} {encoder.decode([token])!r}" for token, loss in pairs]


GOLDEN = {
    "chat": r"""
  151644 '<|im_start|>'
     872 'user'
     198 '\n'
      17 '2'
      10 '+'
      17 '2'
      30 '?'
  151645 '<|im_end|>'
     198 '\n'
  151644 '<|im_start|>'
   77091 'assistant'
     198 '\n'
*     19 '4'
* 151645 '<|im_end|>'
     198 '\n'
  151644 '<|im_start|>'
     872 'user'
     198 '\n'
   10234 'Why'
      30 '?'
  151645 '<|im_end|>'
     198 '\n'
  151644 '<|im_start|>'
   77091 'assistant'
     198 '\n'
* 151667 '<think>'
*    198 '\n'
*   2212 'Add'
*    624 '.\n'
* 151668 '</think>'
*    271 '\n\n'
*     19 '4'
* 151645 '<|im_end|>'
""",
    "prefix-suffix-middle": r"""
  151659 '<|fim_prefix|>'
      67 'd'
  151661 '<|fim_suffix|>'
    2075 '(x'
     982 '):\n'
     262 '   '
     470 ' return'
     856 ' x'
     198 '\n'
  151660 '<|fim_middle|>'
*    823 'ef'
*    282 ' f'
* 151643 '<|endoftext|>'
""",
    "suffix-prefix-middle": r"""
* 151659 '<|fim_prefix|>'
* 151661 '<|fim_suffix|>'
*   2075 '(x'
*    982 '):\n'
*    262 '   '
*    470 ' return'
*    856 ' x'
*    198 '\n'
* 151660 '<|fim_middle|>'
*     67 'd'
*    823 'ef'
*    282 ' f'
* 151643 '<|endoftext|>'
""",
    "repository": r"""
* 151663 '<|repo_name|>'
*   2660 'me'
*  10640 '/app'
*    198 '\n'
* 151664 '<|file_sep|>'
*     64 'a'
*   7197 '.py'
*    198 '\n'
*     87 'x'
*    284 ' ='
*    220 ' '
*     16 '1'
*    271 '\n\n'
* 151664 '<|file_sep|>'
*     65 'b'
*   7197 '.py'
*    198 '\n'
*     88 'y'
*    284 ' ='
*    220 ' '
*     17 '2'
* 151643 '<|endoftext|>'
""",
}


CASES: dict[str, tuple[Document, dict[str, Any]]] = {
    "chat": (Document(0, "c.jsonl:1", parse_conversation(CHAT).to_text()), {"format": "chat"}),
    "prefix-suffix-middle": (CODE, {"format": "code", "fim": {"rate": 1, "spm_rate": 0, "loss": "middle"}}),
    "suffix-prefix-middle": (CODE, {"format": "code", "fim": {"rate": 1, "spm_rate": 1}}),
    "repository": (REPOSITORY, {"format": "code", "group_by": "repository", "metadata": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_token_is_qwen3s(name: str) -> None:
    document, source = CASES[name]
    assert shown(document, **source) == [line for line in GOLDEN[name].splitlines() if line]
