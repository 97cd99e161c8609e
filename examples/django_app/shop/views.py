"""Two ways to use a batcher in a view: wait for the result of your job, or submit the job and do not wait."""

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from microbatch.integrations.django import batchers
from shop.models import Order


@csrf_exempt
@require_POST
def order(request: HttpRequest) -> JsonResponse:
    """Insert an order in a batch with the orders of other requests, and respond with its number."""
    result = batchers["orders"].submit(request.POST["what"], timeout=1).result(timeout=5)
    return JsonResponse({"order": result.value, "what": request.POST["what"], "batch": result.batch.size})


@csrf_exempt
@require_POST
def pay(request: HttpRequest, number: int) -> JsonResponse:
    """Pay for an order, and submit its receipt when the transaction commits."""
    with transaction.atomic():
        order = Order.objects.select_for_update().get(pk=number)
        transaction.on_commit(lambda: batchers["receipts"].submit(order.pk, timeout=1), robust=True)
    return JsonResponse({"paid": order.pk})
