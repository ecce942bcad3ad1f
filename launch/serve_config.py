"""ServeSettings: where ``burnish serve`` listens, to whom, and how much it takes on.  May import: pydantic."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Self

from pydantic import Field, model_validator

from trainers.settings import Settings

Positive = Annotated[int, Field(ge=1)]


class ServeSettings(Settings):
    """An OpenAI-compatible endpoint over HTTP."""

    host: str = Field("127.0.0.1", description="address to listen on; one that other machines reach needs api_key_env")
    port: int = Field(8000, ge=0, le=65535, description="to listen on; 0: any that is free, which is printed")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds the key which every "
        "request has to bring; default: none is asked for"
    )  # fmt: skip
    model_name: str | None = Field(
        None, min_length=1, description="what requests call the model; default: the name of its folder"
    )
    max_requests: Positive = Field(64, description="answered at once; who comes then is told to come again (429)")
    deadline_s: float = Field(
        600.0, gt=0, description="for one answer; the request then ends with 504, and its place is free once its "
        "workers are done"
    )  # fmt: skip

    @model_validator(mode="after")
    def _strangers_need_a_key(self) -> Self:
        if self.api_key_env is None and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host}: whoever reaches this address could use the model; set api_key_env, or listen on "
                "127.0.0.1"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
