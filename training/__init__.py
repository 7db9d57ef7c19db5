"""PPO and SFT trainers."""
