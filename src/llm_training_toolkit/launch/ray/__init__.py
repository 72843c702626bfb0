"""Ray Train: controller, worker groups, failures and scaling."""
