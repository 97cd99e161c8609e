"""Settings of the shop. The settings for microbatch come first."""

import os
from pathlib import Path

from microbatch import Natural, Size

INSTALLED_APPS = ["microbatch.integrations.django.Microbatch", "shop"]
MICROBATCH = {
    "orders": {"PROCESSOR": "shop.batches.insert_orders", "POLICY": Size(100) | Natural()},
    "receipts": {"PROCESSOR": "shop.batches.send_receipts", "POLICY": Size(50) | Natural()},
}

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("SHOP_DATABASE", Path(__file__).parent.parent / "shop.sqlite3"),
        "CONN_MAX_AGE": 60,  # each worker thread keeps its connection for later batches
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL",
        },
    }
}
ROOT_URLCONF = "shop.urls"
WSGI_APPLICATION = "shop.wsgi.application"
SECRET_KEY = "only for this example"
DEBUG = os.environ.get("SHOP_DEBUG") == "1"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "testserver"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
