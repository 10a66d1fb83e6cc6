"""What tests ask the server, and what it should say."""

import json

from PIL import Image

from pmod_cli.serving.chat import Chat
from pmod_cli.serving.generation import Sampling
from tests.model.models import image
from tests.serving.load import body, data_url

CHAT = "/v1/chat/completions"
PICTURES = [image(64, 40, seed=3), image(32, 64, seed=4), image(64, 64, seed=5)]
QUESTIONS = ("what is the price of ham?", "yes", "which is dearer, ham or tea?", "is there a red ring?", "what?")


def alone(answerer, question: str, *pictures: Image.Image, count: int = 6) -> str:
    return "".join(Chat(answerer).ask(question, pictures, Sampling(count)))


async def ask(client, question: str, *pictures, **more) -> str:
    response = await client.post(CHAT, json=body(question, *map(data_url, pictures), **more))
    found = await response.json()
    assert response.status == 200, found
    return found["choices"][0]["message"]["content"]


async def events(response) -> list[dict]:
    lines = [line[6:] for line in (await response.text()).splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
