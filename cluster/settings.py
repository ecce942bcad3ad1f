"""Configuration of the cluster room.  May import: pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ClusterSettings(BaseModel):
    """Where the run takes place."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    backend: Literal["ray", "in_process"] = Field(
        "ray", description="in_process: every role in this process, one after the other, for a debugger"
    )
    address: str = Field(
        "auto", description="auto: join the cluster of RAY_ADDRESS or of this job, else start one here; or HOST:PORT"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where the cluster has GPUs")
    num_nodes: int | None = Field(None, ge=1, description="refuse to start with fewer; default: whatever there is")
    colocate: bool = Field(
        False, description="all roles share the same GPUs by fraction instead of having their own"
    )
    placement_deadline_s: float = Field(600.0, gt=0, description="for the cluster to grant the placement")
    start_deadline_s: float = Field(900.0, gt=0, description="for every worker to be constructed")
    object_store_bytes: int = Field(512 * 2**20, ge=80 * 2**20, description="of a Ray started here")
