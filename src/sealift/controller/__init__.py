"""The controller: inventory, plan, orchestration and record of migrations."""
