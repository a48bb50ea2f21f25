"""Text to tokens and back, alike in driver, engine, rewards and exports."""
