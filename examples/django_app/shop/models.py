"""The tables of the shop."""

from django.db import models


class Order(models.Model):
    """An order of a customer."""

    what = models.CharField(max_length=100)


class Receipt(models.Model):
    """A receipt that was sent to a customer."""

    order = models.OneToOneField(Order, on_delete=models.CASCADE)
