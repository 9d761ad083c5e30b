"""The learning algorithms: each file has a frozen Config and train(policy, world, config), one
Metrics an iteration."""
