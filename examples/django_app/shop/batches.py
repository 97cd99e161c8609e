"""What is done for many jobs at once."""

from shop.models import Order, Receipt


def insert_orders(wanted: list[str]) -> list[int]:
    """Insert one order for each, in one statement, and return their numbers."""
    return [order.pk for order in Order.objects.bulk_create(Order(what=what) for what in wanted)]


def send_receipts(orders: list[int]) -> None:
    """Send a receipt for each order. (Here it is only written down.)"""
    Receipt.objects.bulk_create(Receipt(order_id=order) for order in orders)
