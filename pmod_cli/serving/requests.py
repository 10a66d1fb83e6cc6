"""The body of an OpenAI request: read strictly, and every fault is a sentence that names its place.

What would change an answer and is not done here (tools, several choices, log probabilities, penalties, and what vLLM
takes besides) is refused; other fields that clients send, such as `user`, are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pmod_cli.core import json_text
from pmod_cli.serving.generation import MAX_NEW_TOKENS, Sampling

ROLES = ("system", "developer", "user", "assistant")
MOST_IMAGES = 16
MOST_PARTS = 1_000_000  # lists, objects and what they hold; reading more would hold up all others
MOST_STOPS, LONGEST_STOP = 4, 200
NOT_DONE = {  # and what they may hold all the same
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "n": (1,),
    "web_search_options": (),
    "top_k": (-1, 0),  # from here on of vLLM, whose clients send them as `extra_body`
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "structured_outputs": (),
    **{f"guided_{kind}": () for kind in ("json", "regex", "choice", "grammar")},
    "prompt_logprobs": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}


class BadRequest(Exception):
    """A request that is not answered.

    Args:
        what: The sentence for the client.
        status: Of HTTP.
        param: The field that is meant.
        code: For programs.
    """

    def __init__(self, what: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(what)
        self.what, self.status, self.param, self.code = what, status, param, code


@dataclass(frozen=True)
class ChatRequest:
    """What is asked.

    Attributes:
        messages: as chat templates take them; a part `{"type": "image"}` stands for each picture.
        images: URLs of the pictures, in the order of their places, each with the field it stands in.
        sampling: how tokens are chosen.
        stop: strings that end the answer.
        stream: whether the answer comes in pieces.
        include_usage: whether the last of them counts the tokens.
    """

    messages: list[dict[str, Any]]
    images: list[tuple[str, str]]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse(body: bytes, *, served: str) -> ChatRequest:
    """The request of a body.

    Args:
        served: Name of the model.

    Raises:
        BadRequest: It is malformed, or asks for what is not done here.
    """
    if sum(map(body.count, (b"[", b"{", b","))) > MOST_PARTS:  # of texts too: those fit no context
        raise BadRequest(f"the body holds more than {MOST_PARTS:,} lists, objects and values")
    try:
        value = json_text.loads(body)
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body is expected to be a JSON object")
    for name, allowed in NOT_DONE.items():
        if value.get(name) is not None and value[name] not in allowed:
            raise BadRequest(f"{name} is not supported by this server", param=name, code="unsupported")
    model = _get(value, "model", str, served)
    if model != served:
        raise BadRequest(
            f"the model {model!r:.80} is not served here; this server has {served!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    stream = _get(value, "stream", bool, False)
    options = _get(value, "stream_options", dict, {})
    images: list[tuple[str, str]] = []
    messages = list(_messages(value.get("messages"), images))
    if len(images) > MOST_IMAGES:
        raise BadRequest(f"{len(images)} pictures in one request; at most {MOST_IMAGES} are taken", param="messages")
    include_usage = _get(options, "include_usage", bool, False)
    return ChatRequest(messages, images, _sampling(value), _stop(value.get("stop")), stream, include_usage)


def _messages(given: Any, images: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise BadRequest("messages is expected to be a list of one message or more", param="messages")
    for place, message in enumerate(given):
        where = f"messages[{place}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadRequest(
                f"{where} is expected to be an object whose role is one of {', '.join(ROLES)}", param=where
            )
        role = "system" if message["role"] == "developer" else message["role"]
        content = list(_parts(message.get("content"), f"{where}.content", images, shows=role == "user"))
        yield {"role": role, "content": content}
    if given[-1]["role"] != "user":
        raise BadRequest("the last message is expected to be the user's", param=f"messages[{len(given) - 1}]")


def _parts(content: Any, where: str, images: list[tuple[str, str]], *, shows: bool) -> Iterator[dict[str, Any]]:
    if isinstance(content, str):
        yield {"type": "text", "text": content}
        return
    if not isinstance(content, list) or not content:
        raise BadRequest(f"{where} is expected to be a text, or a list of parts", param=where)
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield {"type": "text", "text": part["text"]}
        elif kind == "image_url" and shows:
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str) or not url:
                raise BadRequest(f'{place} is expected to hold {{"image_url": {{"url": ...}}}}', param=place)
            images.append((url, place))
            yield {"type": "image"}
        else:
            known = "a text, or an image_url" if shows else "a text; pictures stand in messages of the user"
            raise BadRequest(f"{place} is expected to be {known}", param=place)


def _sampling(value: dict[str, Any]) -> Sampling:
    limit = _number(value, "max_tokens", MAX_NEW_TOKENS, 1, 2**31, whole=True)
    limit = _number(value, "max_completion_tokens", limit, 1, 2**31, whole=True)
    top_p = _number(value, "top_p", 1.0, 0, 1)
    if not top_p:
        raise BadRequest("top_p is expected to be above 0", param="top_p")
    seed = _number(value, "seed", -1, -(2**63), 2**63 - 1, whole=True) if value.get("seed") is not None else None
    return Sampling(int(limit), float(_number(value, "temperature", 0.0, 0, 2)), float(top_p), seed)


def _stop(given: Any) -> tuple[str, ...]:
    found = [given] if isinstance(given, str) else [] if given is None else given
    good = isinstance(found, list) and len(found) <= MOST_STOPS
    if not good or not all(isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in found):
        raise BadRequest(
            f"stop is expected to be a text of 1 to {LONGEST_STOP} characters, or a list of up to {MOST_STOPS} of them",
            param="stop",
        )
    return tuple(found)


def _get(value: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    found = value.get(name)
    if found is None:
        return default
    if not isinstance(found, kind):
        expected = {str: "a text", bool: "true or false", dict: "an object"}[kind]
        raise BadRequest(f"{name} is expected to be {expected}", param=name)
    return found


def _number(value: dict[str, Any], name: str, default: Any, low: Any, high: Any, *, whole: bool = False) -> Any:
    found = value.get(name)
    if found is None:
        return default
    good = isinstance(found, int) or (isinstance(found, float) and not whole)
    if not good or isinstance(found, bool) or not low <= found <= high:
        kind = "a whole number" if whole else "a number"
        bounds = f" of {low} to {high}" if high < 2**31 else f" of {low} or more" if low > -(2**31) else ""
        raise BadRequest(f"{name} is expected to be {kind}{bounds}", param=name)
    return found
