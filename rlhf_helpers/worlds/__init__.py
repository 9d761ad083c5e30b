"""Where rewards come from: small seeded worlds whose optimum is known."""
