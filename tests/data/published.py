"""The published rules of what is learned in a conversation, token for token, as a plain loop over token counts.

Written from what ``preprocess_v1``, ``preprocess_llama_2`` (which Mistral uses), ``preprocess_llama3`` and
``preprocess_qwen`` of the published training code do: token ids of the whole conversation, then counting the tokens of
its rounds one by one. The project's own code finds the same places by character offsets instead.
"""

from tests.data.tokenizers import tokenizer_of

IGNORED, PLACE = -100, -200
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
QWEN = "You are a helpful assistant."


def learned(template: str, said: list[tuple[str, str]], has_image: bool) -> tuple[list[int], list[int]]:
    """Token ids, an image being -200, and labels, of turns (human or gpt, text)."""
    if has_image:
        said = [(who, front(text)) for who, text in said]
    if said[0][0] != "human":
        said = said[1:]
    if template in ("llama3", "qwen"):
        return by_message(template, said)
    prompt = vicuna_prompt(said) if template == "vicuna_v1" else mistral_prompt(said)
    question_end = " ASSISTANT: " if template == "vicuna_v1" else "[/INST] "
    return by_round(prompt, question_end, tokenizer_of(template), has_image)


def front(text: str) -> str:
    if "<image>" not in text:
        return text
    return ("<image>\n" + text.replace("<image>", "").strip()).strip()


def vicuna_prompt(said):
    prompt = VICUNA + " "
    for number, (_, text) in enumerate(said):
        role = ("USER", "ASSISTANT")[number % 2]
        prompt += f"{role}: {text}{(' ', '</s>')[number % 2]}" if text else f"{role}:"
    return prompt


def mistral_prompt(said):
    prompt = ""
    for number, (_, text) in enumerate(said):
        if text:
            prompt += f"[INST] {text} [/INST]" if number % 2 == 0 else f" {text} </s>"
    return prompt


def count(tokenizer, text, has_image):
    return len(with_images(tokenizer, text)) if has_image else len(tokenizer(text).input_ids)


def with_images(tokenizer, text):
    pieces = [tokenizer(piece).input_ids for piece in text.split("<image>")]
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [PLACE, *piece[1:]]  # each piece has a beginning-of-sequence token of its own
    return ids


def by_round(prompt, question_end, tokenizer, has_image, longest=4096):
    ids = with_images(tokenizer, prompt) if has_image else tokenizer(prompt).input_ids[:longest]
    labels = list(ids)
    labels[0] = IGNORED
    at = 1
    for part in prompt.split("</s>"):
        if part == "" or len(part.split(question_end)) != 2:
            break
        question = count(tokenizer, part.split(question_end)[0] + question_end, has_image) - 2
        labels[at : at + question] = [IGNORED] * len(labels[at : at + question])
        at += count(tokenizer, part, has_image)
    labels[at:] = [IGNORED] * len(labels[at:])
    if at < longest and at != len(ids):
        labels = [IGNORED] * len(ids)
    return ids, [IGNORED if label == PLACE else label for label in labels]


def by_message(template, said):
    tokenizer = tokenizer_of(template)
    raw = tokenizer.convert_tokens_to_ids
    if template == "llama3":
        begin, marks = "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        always = [raw(token) for token in [begin, *marks, "\n\n"]]
        form, system, strip = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>", LLAMA3, str.strip
    else:
        begin, marks = "", ["<|im_start|>", "<|im_end|>"]
        always = [raw(token) for token in marks] + tokenizer("\n", add_special_tokens=False).input_ids
        form, system, strip = "<|im_start|>{}\n{}<|im_end|>\n", QWEN, str
    ids, labels = [], []
    for who, text in [("system", system), *said]:
        role = {"human": "user", "gpt": "assistant"}.get(who, who)
        text = (begin if who == "system" else "") + form.format(role, strip(text))
        message = tokenizer(text, add_special_tokens=False).input_ids
        ids += message
        labels += message if role == "assistant" else [IGNORED] * len(message)
    place = raw("<image>")
    labels = [i if i in always else IGNORED if i == place else label for i, label in zip(ids, labels, strict=True)]
    return [PLACE if i == place else i for i in ids], labels
