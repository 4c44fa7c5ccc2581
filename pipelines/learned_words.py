"""Words an adapter brings along with its layers (textual inversion, arXiv:2208.01618), as lora_diffusion stores them.

While the adapter hangs on a model, its text encoder knows them: the tokenizer keeps each as one token, and the table of
embeddings has one more row for each.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attach import Attachment
from .errors import AdapterError


@contextmanager
def taught(components: Mapping[str, Any], attachments: Sequence[Attachment]) -> Generator[None]:
    """Teach a model the words of its adapters for the length of a `with` block.

    On leaving, also by an exception, tokenizer and table are those they were.

    Args:
        components: The model's, with `tokenizer` and `text_encoder`.
        attachments: The adapters; most bring no words.

    Raises:
        AdapterError: A word has another width than the encoder, or two adapters bring the same one.
    """
    words = _words(attachments)
    if not words:
        yield
        return
    tokenizer, encoder = components["tokenizer"], components["text_encoder"]
    table: nn.Embedding = encoder.get_input_embeddings()
    for word, (name, row) in words.items():
        if row.numel() != table.embedding_dim:
            raise AdapterError(
                f"{name} brings the word {word} with {row.numel()} numbers; this model's words have "
                f"{table.embedding_dim}.",
                "Choose the model it was made for.",
            )
    rows = torch.stack([row.flatten() for _, row in words.values()]).to(table.weight)
    weight, count, known = table.weight, table.num_embeddings, tokenizer.backend_tokenizer
    try:
        tokenizer._tokenizer = type(known).from_str(known.to_str())  # its own copy: words cannot be taken out again
        first = len(tokenizer)
        tokenizer.add_tokens(list(words))
        if first != count or len(tokenizer) != count + len(words):
            raise AdapterError("The words of this adapter are words of the model already.", "Use it without them.")
        table.weight = nn.Parameter(torch.cat([weight.detach(), rows]), requires_grad=weight.requires_grad)
        table.num_embeddings = len(tokenizer)
        yield
    finally:
        tokenizer._tokenizer = known
        table.weight, table.num_embeddings = weight, count


def _words(attachments: Sequence[Attachment]) -> dict[str, tuple[str, Tensor]]:
    found: dict[str, tuple[str, Tensor]] = {}
    for attachment in attachments:
        for word, row in attachment.adapter.words.items():
            if word in found:
                raise AdapterError(
                    f"{found[word][0]} and {attachment.name} both bring the word {word}.", "Use one of them at a time."
                )
            found[word] = attachment.name, row
    return found
