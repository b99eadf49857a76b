"""These tests run with `manage.py test` and with pytest-django."""

from django.contrib.auth.models import Permission
from django.test import TestCase, TransactionTestCase

from shop.models import Order


class OrderTest(TestCase):
    def test_an_order_is_not_paid(self) -> None:
        Order.objects.create(number=1)
        self.assertFalse(Order.objects.get(number=1).paid)

    def test_what_migrations_made_is_there(self) -> None:
        self.assertTrue(Permission.objects.filter(codename="add_order").exists())


class PaymentTest(TransactionTestCase):
    def test_two_orders(self) -> None:
        Order.objects.create(number=1)
        Order.objects.create(number=2, paid=True)
        self.assertEqual(Order.objects.filter(paid=True).count(), 1)
