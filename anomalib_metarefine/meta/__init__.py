"""Model-Agnostic Meta-Learning (MAML) of the flow's initialisation."""
