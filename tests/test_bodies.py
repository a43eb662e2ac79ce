"""Bodies are read within their bounds, before anything is made of them."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fastapi import Request
from starlette.types import Message

from cluster.errors import InvalidPrompt, TooLarge
from cluster.settings import MIB
from serve_app import bodies
from serve_app.bodies import JSON_BYTES, SegmentBody, Sent

LIMIT = 256 * MIB


def read(sent: httpx.Request, declared: bool = True) -> Sent:
    headers = [pair for pair in sent.headers.raw if declared or pair[0].lower() != b"content-length"]
    scope = {"type": "http", "headers": [(name.lower(), value) for name, value in headers]}

    async def receive() -> Message:
        return {"type": "http.request", "body": sent.read()}

    return asyncio.run(bodies.read(Request(scope, receive), LIMIT))


@pytest.mark.parametrize("declared", [True, False])
def test_json_has_a_bound_of_its_own(declared: bool) -> None:
    post = httpx.Request("POST", "http://a", json={"image_uri": "a" * JSON_BYTES})
    with pytest.raises(TooLarge, match=str(JSON_BYTES)):
        read(post, declared)
    assert len(read(httpx.Request("POST", "http://a", content=bytes(JSON_BYTES + 1))).images[0][1]) == JSON_BYTES + 1


def test_beside_an_image_it_may_be_as_long() -> None:
    text = json.dumps({"image_uri": "a" * (JSON_BYTES - 20)})
    post = httpx.Request("POST", "http://a", files={"image": ("a", b"b")}, data={"request": text})
    assert read(post).text == text


def test_few_objects_with_many_points_are_not_padded_to_many_with_many() -> None:
    many = {"points": [[[1, 1]] * 200_000] + [[[1, 1]]] * 4000}
    with pytest.raises(InvalidPrompt, match="200000 points for one object; the limit is 128"):
        SegmentBody.parse(json.dumps(many)).asked(4096)
    with pytest.raises(InvalidPrompt, match="4001 prompts for one image; the limit is 4000"):
        SegmentBody.parse(json.dumps(many)).asked(4000)


def test_objects_may_have_different_numbers_of_points() -> None:
    made = SegmentBody.parse('{"points": [[[1, 2], [3, 4]], [[5, 6]]]}').asked(2)
    assert made.points is not None
    assert made.labels is not None
    assert made.points.tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]
    assert made.labels.tolist() == [[1, 1], [1, -1]]


@pytest.mark.parametrize("text", ['{"multimask": "yes"}', '{"points": [[["1", 2]]]}', '{"image_id": 3}', '{"a": 1}'])
def test_nothing_is_guessed(text: str) -> None:
    with pytest.raises(InvalidPrompt):
        SegmentBody.parse(text)
