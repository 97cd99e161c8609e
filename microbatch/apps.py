"""The app for Django, where Django looks for it if ``INSTALLED_APPS`` has ``"microbatch"``. Needs the extra ``django``."""

from microbatch.integrations.django import Microbatch

__all__ = ["Microbatch"]
