"""Text as token ids. Nothing here ends with end-of-sequence, whatever the tokenizer is set to add: a model that reads
its own end would answer as if a new text began."""


def encode(tokenizer, texts: list[str], begin: bool = False) -> list[list[int]]:
    """The token ids of whole texts. begin: with what the tokenizer puts in front of a text."""
    return [_without_end(tokenizer, ids) for ids in tokenizer(texts, add_special_tokens=begin).input_ids]


def encode_part(tokenizer, text: str) -> list[int]:
    """The token ids of a text that stands inside another one: without begin-of-sequence, too."""
    (ids,) = encode(tokenizer, [text])
    start = 0
    while start < len(ids) and ids[start] in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        start += 1
    return ids[start:]


def _without_end(tokenizer, ids: list[int]) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        end -= 1
    return ids[:end]


def shorten(tokenizer, text: str, excess: int) -> str:
    """`text` without its last `excess` tokens, always shorter than before."""
    if not getattr(tokenizer, "is_fast", False):
        return _shorten_by_characters(tokenizer, text, excess)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = found.offset_mapping[: len(_without_end(tokenizer, found.input_ids))]
    # A character may be several tokens, so the cut is where the first token to go begins.
    end = offsets[len(offsets) - excess][0] if excess < len(offsets) else 0
    return text[: min(end, len(text) - 1)].rstrip()


def _shorten_by_characters(tokenizer, text: str, excess: int) -> str:
    """`shorten` for a tokenizer that does not say which characters a token stands for: the longest beginning of the
    text that is found to have few enough tokens."""
    most = max(0, len(encode(tokenizer, [text])[0]) - excess)
    shortest, longest = 0, len(text) - 1  # of the latter no more than this is known to be too long
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if len(encode(tokenizer, [text[:middle]])[0]) <= most:
            shortest = middle
        else:
            longest = middle - 1
    return text[:shortest].rstrip()
