import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")      # before it is imported
