"""The post-processor of a tokenizer.json: whether it puts bos before a text.

Programs that read a tokenizer.json, transformers among them, take bos from its
post-processor, and ignore the setting add_bos_token in the file beside it.
"""

import json
from collections.abc import Iterator
from typing import Any

import tokenizers

Values = dict[str, Any]


def set_bos(text: str, name: str, add: bool) -> str:
    """Returns a tokenizer.json that puts bos before every text, or does not.

    Everything else that its post-processor does stays.

    Args:
      text: the content of tokenizer.json.
      name: of the token bos, one of the tokenizer's.
      add: whether bos comes first.
    """
    library_tokenizer = tokenizers.Tokenizer.from_str(text)
    id = library_tokenizer.token_to_id(name)
    assert id is not None, name
    nothing = library_tokenizer.encode("", add_special_tokens=False)
    if (library_tokenizer.post_process(nothing).ids[:1] == [id]) == add:
        return text
    values = json.loads(text)
    processor = values.get("post_processor")
    values["post_processor"] = (
        _with_bos(processor, name, id) if add else _without_bos(processor, name, id)
    )
    return json.dumps(values, ensure_ascii=False)


def _with_bos(processor: Values | None, name: str, id: int) -> Values:
    own = dict(id=name, ids=[id], tokens=[name])
    for template in _templates(processor):
        template["special_tokens"][name] = own
        template["single"].insert(0, _token(name, 0))
        # Bos stands before each text of a pair, as before a text alone.
        template["pair"].insert(0, _token(name, 0))
        second = template["pair"].index(_find(template["pair"], "B"))
        template["pair"].insert(second, _token(name, 1))
        return processor or {}
    template = _template([_token(name, 0), _text("A")], [own])
    template["pair"] = [*template["single"], _token(name, 1), _text("B")]
    return dict(type="Sequence", processors=[*_parts(processor), template])


def _without_bos(processor: Values | None, name: str, id: int) -> Values | None:
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        kept = [_without_bos(part, name, id) for part in processor["processors"]]
        return processor | dict(processors=kept)
    if processor["type"] == "TemplateProcessing":
        tokens = processor["special_tokens"]
        kinds = {kind for kind, token in tokens.items() if token["ids"] == [id]}
        pieces = {
            key: [x for x in processor[key] if _token_of(x) not in kinds]
            for key in ("single", "pair")
        }
        return processor | pieces
    if processor.get("cls", [None, None])[1] != id:
        return processor
    # BertProcessing is bos A sep B sep; RobertaProcessing has two sep between A and B.
    sep, sep_id = processor["sep"]
    is_roberta = processor["type"] == "RobertaProcessing"
    template = _template(
        [_text("A"), _token(sep, 0)], [dict(id=sep, ids=[sep_id], tokens=[sep])]
    )
    second = [_token(sep, 0)] * is_roberta + [_text("B"), _token(sep, 0)]
    template["pair"] = [*template["single"], *second]
    return template


def _parts(processor: Values | None) -> list[Values]:
    """The processors of a sequence; a processor alone as a list."""
    if processor is None:
        return []
    return processor["processors"] if processor["type"] == "Sequence" else [processor]


def _templates(processor: Values | None) -> Iterator[Values]:
    """The template of a processor, if it has one."""
    parts = _parts(processor)
    return (part for part in parts if part["type"] == "TemplateProcessing")


def _template(single: list[Values], special: list[Values]) -> Values:
    return dict(
        type="TemplateProcessing",
        single=single,
        special_tokens={token["id"]: token for token in special},
    )


def _token(name: str, type_id: int) -> Values:
    return {"SpecialToken": dict(id=name, type_id=type_id)}


def _text(id: str) -> Values:
    return {"Sequence": dict(id=id, type_id="AB".index(id))}


def _token_of(piece: Values) -> str | None:
    return piece.get("SpecialToken", {}).get("id")


def _find(pieces: list[Values], id: str) -> Values:
    """The piece that stands for the text A or B."""
    return next(x for x in pieces if x.get("Sequence", {}).get("id") == id)
