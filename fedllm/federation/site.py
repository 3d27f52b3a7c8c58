"""Who a client process is: a simulated site of the run, or a real site with its own policy."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.app import Context

from fedllm.config import Config, site_ranks
from fedllm.data.sites import SiteData, elsewhere, simulated_site, site_from_file, site_names
from fedllm.errors import BudgetError, DataError, PrivacyError
from fedllm.federation.memory import SiteMemory
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.policy import SitePolicy, load_policy
from fedllm.runs.folder import RunFolder
from fedllm.settings import DataSettings

# an embedded model's or a hub's; no folder of the site
_MODEL_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One site in one message.

    Attributes
    ----------
    config : Config
        The server's settings after the site's own policy replaced what is the site's to say.
    folder : Path
        Where ledger and cache live.
    """

    name: str
    simulated: bool
    policy: SitePolicy
    config: Config
    folder: Path
    index: int

    def data(self) -> SiteData:
        """Load the site's records.

        Raises
        ------
        DataError
            If they cannot be used as the settings ask.
        """
        data = self.config.data
        if self.simulated:
            return simulated_site(
                data,
                sites=self.config.federation.sites,
                seed=self.config.run.seed,
                index=self.index,
                fold=self.config.evaluation.fold,
                pooled=self.config.federation.mode == "central",
            )
        return site_from_file(
            data,
            path=self.policy.data_path,
            heldout_path=self.policy.heldout_path,
            private_heldout_path=self.policy.private_heldout_path,
            name=self.name,
            seed=self.config.run.seed,
            fold=self.config.evaluation.fold,
            lenient=self.config.privacy.enabled,
        )

    def elsewhere(self) -> SiteData | None:
        """Return other sites' held-out records to judge this site's own adapter on.

        None unless sites are simulated and train each alone: real ones have no records but their own.
        """
        config = self.config
        if not self.simulated or config.federation.mode != "local" or config.federation.sites < 2:
            return None
        return elsewhere(
            config.data,
            sites=config.federation.sites,
            seed=config.run.seed,
            index=self.index,
            fold=config.evaluation.fold,
            records=config.evaluation.final_records,
        )

    def ledger(self) -> Ledger:
        """Open the site's privacy ledger; a new one is made where there is none."""
        return Ledger(self.folder / "ledger.sqlite")

    def memory(self, run: str) -> SiteMemory:
        """Return what the site keeps of a run, apart for private and open messages."""
        return SiteMemory(self.folder / ("private-memory" if self.config.private_replies else "memory"), run)

    @property
    def has_ledger(self) -> bool:
        """Return whether the site has a privacy ledger already."""
        return (self.folder / "ledger.sqlite").is_file()

    @property
    def ledger_tag(self) -> str:
        """Return under what the coordinator remembers this site's ledger: a hash of site and data set."""
        return hashlib.sha256(f"{self.name}\n{self.policy.dataset}".encode()).hexdigest()[:16]

    @property
    def rank(self) -> int:
        """Return the adapter rank this site trains."""
        if self.simulated:
            ranks = site_ranks(self.config)
            return ranks[self.index % len(ranks)]
        most = self.config.adapter.rank
        return min(most, self.policy.max_rank or most)

    @property
    def public_path(self) -> str:
        """Return the file of public records for a gradient basis; empty if there is none."""
        return self.config.adapter.basis_path if self.simulated else self.policy.public_path

    @property
    def metrics_may_leave(self) -> bool:
        """Return whether metrics on held-out records may be sent."""
        return not self.config.private_replies or self.config.data.heldout_public


def identify(context: Context, config: Config, index: int) -> Site:
    """Work out which site this process is.

    A process whose node config names a policy is a real site: data path, columns and model
    folder come from the policy, and a path sent by the server is refused. Without a policy only
    a simulation may train.

    Raises
    ------
    BudgetError
        If the policy does not allow the settings, or there is no policy outside a simulation.
    ConfigError
        If the policy cannot be read.
    """
    if "policy" in context.node_config:
        return real_site(Path(str(context.node_config["policy"])), config)
    if not (context.node_config.get("simulated") is True or in_simulation()):
        raise BudgetError(
            "this SuperNode names no site policy; start it with --node-config 'policy=\"/path/site.toml\"'."
        )
    name = site_names(config.data, sites=config.federation.sites)[index]
    folder = RunFolder(Path(config.run.dir)).site_dir(name)
    policy = simulated_policy(name, config)
    path = folder / "policy.toml"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("# a simulated site\n" + policy.to_toml(), encoding="utf-8")
    return Site(
        name=name, simulated=True, policy=policy, config=training_config(config), folder=folder, index=index
    )


def real_site(path: Path, config: Config) -> Site:
    """Return the real site of a policy file, with the settings that are its own to say.

    Raises
    ------
    BudgetError
        If the policy does not allow the settings.
    ConfigError
        If the policy cannot be read.
    """
    policy = load_policy(path)
    if config.data.path or config.model.path or config.adapter.basis_path:
        raise BudgetError(
            f"site {policy.site}: the server sent a file path (data.path, model.path or adapter.basis_path); "
            "a site reads only the files its own policy names."
        )
    if config.federation.mode == "central":
        raise BudgetError(f"site {policy.site}: federation.mode=central pools records, which stay here.")
    if not policy.data_path:
        raise BudgetError(f"site {policy.site}: its policy names no data_path.")
    if not re.fullmatch(_MODEL_NAME, config.model.name):
        raise BudgetError(f"site {policy.site}: the server sent a model.name that is no model's name.")
    policy.require(config.privacy)
    if not config.site_privacy.at_sites:
        policy.require_site_noise(0.0)
    data = replace(
        _own_columns(policy, config.data),
        source="file",
        path="",
        site="",
        partition="iid",
        heldout_public=bool(policy.heldout_path),
    )
    model = replace(config.model, path=policy.model_path)
    return Site(
        name=policy.site,
        simulated=False,
        policy=policy,
        config=replace(config, data=data, model=model),
        folder=Path(policy.state_dir),
        index=0,
    )


def _own_columns(policy: SitePolicy, data: DataSettings) -> DataSettings:
    """Return the settings with the policy's column in every role that the recipe asks for.

    Were names the server's to choose, refusals and counts would answer questions about any column.
    """
    for role in ("pair", "rejected", "options", "unit"):
        if vars(data)[role] and not vars(policy)[role]:
            raise BudgetError(
                f"site {policy.site}: the recipe asks for data.{role}, and its policy names no column for it "
                f'({role} = "...").'
            )
    return replace(
        data,
        text=policy.text,
        label=policy.label,
        unit=policy.unit,
        pair=policy.pair if data.pair else "",
        rejected=policy.rejected if data.rejected else "",
        options=policy.options if data.options else "",
    )


def training_config(config: Config) -> Config:
    """Return the settings a simulated site trains with: pooled records get the steps of a round's sites."""
    if config.federation.mode != "central":
        return config
    return replace(config, train=replace(config.train, local_steps=config.site_steps))


def simulated_policy(name: str, config: Config) -> SitePolicy:
    """Return the policy a simulated site keeps in the run folder: the recipe's own budget."""
    privacy = config.privacy
    return SitePolicy(
        site=name,
        require_privacy=privacy.enabled,
        max_epsilon=privacy.epsilon or 1e9,
        max_delta=privacy.delta,
        min_noise_multiplier=0.0,
    )


def in_simulation() -> bool:
    """Return whether this process is an actor of Flower's simulation engine."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def use_threads(config: Config) -> int:
    """Set torch to the site's share of the cores and return it.

    OpenMP threads spin at barriers: two actors with two threads each on two cores are three
    times slower than with one each.
    """
    threads = config.train.threads
    if not threads and in_simulation():
        import ray

        resources = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        threads = int(resources.get("CPU", 1)) or 1
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    return threads


def public_reason(site: Site | None, error: Exception) -> str:
    """Return an error's text for the server: a real site's folders and numbers stay with it."""
    message = str(error)
    if site is not None and site.simulated:
        return message
    if isinstance(error, DataError):
        # counts and column names of a real site's file are its own business
        return "the site's records cannot be used as the recipe asks; its own log says why"
    if isinstance(error, PrivacyError) and error.public:
        return error.public
    return re.sub(r"(?<![\w.])/(?:[^\s/:,;()]+/)+", "", message)
