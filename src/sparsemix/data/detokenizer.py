"""Token ids -> text as they come, never half a character."""

from tokenizers import Tokenizer

# What a decoder writes for bytes that are no character, or not a whole one yet.
BROKEN = "\ufffd"


class Detokenizer:
    """Pieces whose concatenation is decode(all ids). A token that ends inside a character adds what is whole before it;
    the rest comes with the token that completes it, or with `rest`. Only the ids since the last whole character, and
    those that gave it, are decoded again: a decoder may write a token otherwise at the start of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.context = 0
        self.said = 0

    def add(self, token_id: int) -> str:
        """The text that this token completes; often one word, sometimes nothing."""
        self.ids.append(token_id)
        text = self.tokenizer.decode(self.ids)
        # An unfinished character is one mark at the end; marks before it stand for bytes that are none.
        whole = text.removesuffix(BROKEN)
        piece, self.said = whole[self.said :], max(self.said, len(whole))
        if whole == text and piece:
            self.ids, self.context = self.ids[self.context :], len(self.ids) - self.context
            self.said = len(self.tokenizer.decode(self.ids))
        return piece

    def rest(self) -> str:
        """What is left at the end: the mark of a character that was never completed, or nothing."""
        piece = self.tokenizer.decode(self.ids)[self.said :]
        self.said += len(piece)
        return piece
