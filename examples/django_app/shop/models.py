"""What the shop keeps."""

from django.db import models


class Order(models.Model):
    """What a customer wants."""

    what = models.CharField(max_length=100)


class Receipt(models.Model):
    """What was sent to a customer."""

    order = models.OneToOneField(Order, on_delete=models.CASCADE)
