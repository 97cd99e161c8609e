"""Tests of the shop. Batches run on the connection of the test, so their changes are rolled back with it."""

from concurrent.futures import ThreadPoolExecutor

from django.test import TestCase

from microbatch.integrations.django import SharedConnections, batchers
from shop.models import Order, Receipt


class OrdersTest(SharedConnections, TestCase):
    """Tests of orders and of their receipts."""

    def test_an_order_exists_when_the_view_responds(self) -> None:
        """The view responds after the batch has inserted the order."""
        answer = self.client.post("/orders", {"what": "tea"}).json()
        self.assertEqual("tea", Order.objects.get(pk=answer["order"]).what)

    def test_a_batch_sees_what_the_test_has_not_committed(self) -> None:
        """The receipt is for an order that exists only in this transaction. It is sent when the payment commits."""
        order = Order.objects.create(what="milk")
        with self.captureOnCommitCallbacks(execute=True):
            self.client.post(f"/orders/{order.pk}/pay")
            self.assertFalse(Receipt.objects.exists())
        batchers["receipts"].flush()
        self.assertEqual(order, Receipt.objects.get().order)

    def test_many_requests_at_once(self) -> None:
        """Each request gets the number of its own order."""
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(lambda number: self.client.post("/orders", {"what": f"tea {number}"}).json(), range(100))
            )
        found = {order.pk: order.what for order in Order.objects.all()}
        self.assertEqual({answer["order"]: answer["what"] for answer in answers}, found)
