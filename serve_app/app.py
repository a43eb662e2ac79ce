"""Wiring: from Serve's `args:` to the application."""

from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application

from cluster import settings as settings_module
from cluster.errors import InvalidSettings
from serve_app import contract, models
from serve_app.deployments import IngressReplica, deployment
from serve_app.model_replicas import CellFinderReplica, DecoderReplica, EncoderReplica


class AppArgs(BaseModel):
    """`args:` of the application in deploy/*.yaml."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = Field(None, description="settings file, a path or s3://…; empty means CELLRAY_CONFIG")
    models: list[str] = Field(["nano"], min_length=1, description="models to serve, by name in the settings")


def build(args: AppArgs) -> Application:
    """An encoder and a decoder deployment a model, a cellfinder where it finds cells, and the ingress over them.

    Raises:
        InvalidSettings, NotFound: the settings or a model's name are wrong.
    """
    settings = settings_module.load(args.config)
    if len(set(args.models)) != len(args.models):
        raise InvalidSettings(f"args.models names a model twice: {', '.join(args.models)}")
    handles: list[Application | None] = []
    for name in args.models:
        cells = models.find(settings, name).cells
        handles.append(deployment(EncoderReplica, contract.encoder_deployment(name)).bind(settings, name))
        handles.append(deployment(DecoderReplica, contract.decoder_deployment(name)).bind(settings, name))
        finder = deployment(CellFinderReplica, contract.cellfinder_deployment(name))
        handles.append(finder.bind(settings, name) if cells else None)
    return deployment(IngressReplica, contract.INGRESS).bind(settings, args.models, *handles)
