"""Two ways to use a batcher in a view: wait for the result of your job, or submit the job and do not wait."""

from concurrent.futures import TimeoutError  # before Python 3.11, it is not the built-in one

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from microbatch import BacklogFull, JobExpired
from microbatch.integrations.django import batchers
from shop.models import Order


@csrf_exempt
@require_POST
def order(request: HttpRequest) -> JsonResponse:
    """Insert an order in a batch with the orders of other requests, and respond with its number."""
    try:
        result = batchers["orders"].submit(request.POST["what"], timeout=1, expires_in=5).result(timeout=10)
    except (BacklogFull, JobExpired, TimeoutError):
        return JsonResponse({"error": "busy"}, status=503, headers={"Retry-After": "1"})
    return JsonResponse({"order": result.value, "what": request.POST["what"], "batch": result.batch.size})


@csrf_exempt
@require_POST
def pay(request: HttpRequest, number: int) -> JsonResponse:
    """Pay for an order, and submit its receipt when the transaction commits."""
    with transaction.atomic():
        order = Order.objects.select_for_update().get(pk=number)
        transaction.on_commit(lambda: batchers["receipts"].submit(order.pk, timeout=1), robust=True)
    return JsonResponse({"paid": order.pk})
