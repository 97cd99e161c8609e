"""The processors of the batchers."""

from shop.models import Order, Receipt


def insert_orders(wanted: list[str]) -> list[int]:
    """Insert the orders with one statement, and return their numbers, in the same order."""
    return [order.pk for order in Order.objects.bulk_create(Order(what=what) for what in wanted)]


def send_receipts(orders: list[int]) -> None:
    """Send a receipt for each order. (This example only stores the receipts.)"""
    Receipt.objects.bulk_create(Receipt(order_id=order) for order in orders)
