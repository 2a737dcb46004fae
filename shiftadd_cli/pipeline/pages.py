"""The texts that are written beside a checkpoint: pages for people, from what report.json says, and the code file."""

from __future__ import annotations

from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.report.card import CARD_FILE, render_card
from shiftadd_cli.report.cost import model_cost
from shiftadd_cli.report.page import PAGE_FILE, Run, render_page
from shiftadd_cli.report.schema import Report
from shiftadd_cli.report.unit_costs import load_unit_costs
from shiftadd_cli.runtime.remote_code import code_files


def checkpoint_pages(plan: Plan, report: Report, name: str) -> dict[str, str]:
    """Text by file name for a checkpoint whose folder is called `name`."""
    layouts = {each.spec.name: each.layout for each in plan.linears}
    cost = model_cost(plan.source.skeleton(), layouts, plan.tensors, load_unit_costs())
    run = Run(name, report, cost)
    return {PAGE_FILE: render_page([run]), CARD_FILE: render_card(run), **code_files(plan.source.config)}
