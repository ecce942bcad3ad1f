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
    own_cores: bool = Field(
        False, description="without GPUs: generators, learner and the other models divide the cores of a node among "
        "all of them, to work at the same time (run.max_staleness > 0); default: each role has all cores, in turns"
    )  # fmt: skip
    placement_deadline_s: float = Field(600.0, gt=0, description="for the cluster to grant the placement")
    start_deadline_s: float = Field(900.0, gt=0, description="for every worker to be constructed")
    object_store_bytes: int = Field(512 * 2**20, ge=80 * 2**20, description="of a Ray started here")


class HealthSettings(BaseModel):
    """When a worker counts as dead, what is done about it, and whether nodes that join are made use of."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    detect_s: float = Field(
        30.0, gt=0, description="a generator that says nothing for so long, though it was asked, is dead; one that "
        "is known to have ended is dead at once"
    )  # fmt: skip
    max_attempts: int = Field(
        3, ge=1, description="tries of one prompt group or scoring call whose worker dies, failed starts in a row "
        "after which a role without workers ends the run, and restarts of the trained ranks that bring it no further"
    )  # fmt: skip
    replace: bool = Field(True, description="start a generator in the place of a dead one")
    retry_s: float = Field(10.0, gt=0, description="before the next start after a failed one; doubles with each")
    adopt_up_to: int | None = Field(
        None, ge=1, description="start generators on nodes that join the Ray cluster during the run, up to so many in "
        "all; default: such nodes are left alone"
    )  # fmt: skip
