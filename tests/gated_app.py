"""An encoder whose weights are DeepCell's, of a server that plays it: its replica fetches them when it starts."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from cluster import deepcell, settings
from serve_app import contract
from serve_app.deployments import deployment
from serve_app.model_replicas import EncoderReplica

NAME = "gated"


class Encoder(EncoderReplica):
    def __init__(self, config: str, endpoint: str, md5: dict[str, str]) -> None:
        deepcell.ENDPOINT, deepcell.MD5 = endpoint, md5
        super().__init__(settings.load(config), NAME)


def build(args: dict[str, Any]) -> Application:
    """`config`, and the server's `endpoint` and `md5`."""
    return deployment(Encoder, contract.encoder_deployment(NAME)).bind(args["config"], args["endpoint"], args["md5"])
