"""What strategies are made of: the hooks, losses, gradients, penalties, parameters, adapters and routing."""
