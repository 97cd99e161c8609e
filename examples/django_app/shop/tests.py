"""Tests of a project with batchers: they run on the connection of the test, and what they do is rolled back with it."""

from concurrent.futures import ThreadPoolExecutor

from django.test import TestCase

from microbatch.integrations.django import batchers, sharing_connections
from shop.models import Order, Receipt


class OrdersTest(TestCase):
    """Orders, and receipts for them."""

    def setUp(self) -> None:
        """Have batches run on the connection of the test."""
        sharing = sharing_connections()
        sharing.__enter__()  # from Python 3.11 on: self.enterContext(sharing_connections())
        self.addCleanup(sharing.__exit__, None, None, None)

    def test_an_order_is_there_when_it_is_answered(self) -> None:
        """The view waits for its result."""
        answer = self.client.post("/orders", {"what": "tea"}).json()
        self.assertEqual("tea", Order.objects.get(pk=answer["order"]).what)

    def test_a_batch_sees_what_the_test_has_not_committed(self) -> None:
        """And a receipt is sent when the order is paid, not before."""
        order = Order.objects.create(what="milk")
        with self.captureOnCommitCallbacks(execute=True):
            self.client.post(f"/orders/{order.pk}/pay")
            self.assertFalse(Receipt.objects.exists())
        batchers["receipts"].flush()
        self.assertEqual(order, Receipt.objects.get().order)

    def test_many_requests_at_once(self) -> None:
        """Each gets the number of its own order."""
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(lambda number: self.client.post("/orders", {"what": f"tea {number}"}).json(), range(100))
            )
        found = {order.pk: order.what for order in Order.objects.all()}
        self.assertEqual({answer["order"]: answer["what"] for answer in answers}, found)
